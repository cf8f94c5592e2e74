"""Numbers and what they show: result files, verdicts over seeds, timings, tables and figures."""
