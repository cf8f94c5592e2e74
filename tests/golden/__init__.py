"""Values computed by other libraries or earlier versions, and the scripts that wrote them."""
