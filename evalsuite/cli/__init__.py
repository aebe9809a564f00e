"""The command line: flags in, a spec out, tables and exit codes back."""
