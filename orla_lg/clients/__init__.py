"""The way in for clients other than ChatOpenAI's chat completions: at the HTTP client that they all send by."""
