"""``ChatOrla`` in place of ``ChatOpenAI``: no graph to wrap, hints per call, the record on every answer."""

import sys

from orla_lg import Backend, ChatOrla, Orla
from orla_lg_llamacpp.embedded import EmbeddedEngine

question = " ".join(sys.argv[1:]) or "Why is the sky blue?"
with EmbeddedEngine() as engine, Orla([Backend("local", engine.url, engine="llamacpp")]) as orla:
    llm = ChatOrla(orla=orla, model="local", max_completion_tokens=60)
    for chunk in llm.stream(question, priority=8, tenant="examples"):
        print(chunk.text, end="", flush=True)
    record = orla.records()[-1]
    print(f"\n\n{record.backend}: first token after {record.ttft_s:.2f} s, {record.completion_tokens} tokens")
