"""Values that another library or an earlier version gave, and the programs that wrote them."""
