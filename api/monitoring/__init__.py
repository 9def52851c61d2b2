"""Monitoring: metrics, structured logs with a live tail, and the detector of abnormal states."""
