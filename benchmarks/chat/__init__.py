"""Chats about one image: accuracy of decision windows, and time to first token of later turns."""
