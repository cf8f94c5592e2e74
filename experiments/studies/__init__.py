"""One file per question; `experiments.studies.protocol` says what such a file holds."""
