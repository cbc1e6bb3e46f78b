"""Results: how runs are written and read, compared and shown. Free of torch."""
