"""What travels between a model and those who search it from elsewhere: messages, calls, HTTP."""
