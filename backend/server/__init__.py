"""The OpenAI-compatible server: text of HTTP in, `ChatService` out."""
