"""The verbs: plain functions from records to records, and the jobs that the command line runs."""
