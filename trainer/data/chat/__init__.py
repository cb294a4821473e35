"""Conversations: files of chats become tokens of which it is said which are trained. Torch-free."""
