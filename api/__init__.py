"""Gateway, support service, queue and store adapters, monitoring and the command line."""
