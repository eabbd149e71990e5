"""SGLang: a radix cache with sessions."""
