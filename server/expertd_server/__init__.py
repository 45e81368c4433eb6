"""The server process: HTTP in, tokens out. Asynchronous; knows OpenAI, knows no tensors, never imports torch."""
