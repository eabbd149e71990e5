"""Other clients than the OpenAI SDK's chat completions: which there are, and what each request becomes."""
