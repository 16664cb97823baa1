"""A student in use: its settings for inference, exports, predictions of files, and a server."""
