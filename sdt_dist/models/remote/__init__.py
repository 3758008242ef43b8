"""What travels between a model and those who search it from elsewhere: messages, calls, HTTP.

May import: models, protocols and below. It must not know queues, searches or Ray. To add a field to a message: its column in
`wire.py` with the next version number, and a message of before that is read or refused in words.
"""
