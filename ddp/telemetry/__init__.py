"""What a run says about itself: Prometheus metrics, the SQLite record, the progress line, the report."""
