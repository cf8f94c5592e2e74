"""Numbers and what they show: files of results, verdicts over seeds, timings, tables and plots."""
