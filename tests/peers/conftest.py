"""Scripts for the peers' environments are not tests, and cannot be imported here."""

collect_ignore_glob = ["check_*.py"]
