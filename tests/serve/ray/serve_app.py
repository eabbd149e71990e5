"""A Ray Serve application that speaks chat completions, in front of an engine: run by a test as a process of its own.

FastAPI reads the annotations of its routes, in a class that Ray pickles: they stand here as they are.
"""

import sys
import time

import httpx
import ray
from fastapi import FastAPI, Request, Response
from ray import serve

api = FastAPI()


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Chat:
    """Hands a request to the engine, and its answer back."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._client = httpx.AsyncClient(timeout=60, trust_env=False)

    @api.get("/v1/models")
    async def models(self) -> Response:
        return await self._asked("GET", "/models", b"")

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._asked("POST", "/chat/completions", await request.body())

    async def _asked(self, method: str, path: str, body: bytes) -> Response:
        answer = await self._client.request(
            method, self._engine + path, content=body, headers={"content-type": "application/json"}
        )
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])


def main() -> None:
    address, engine, port = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(Chat.bind(engine), name="chat", route_prefix="/")
    print("serves", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
