"""The message queue (MQ): the format of messages, the port, and the embedded durable queue behind it."""
