"""A generator over HTTP, with the completions and chat interface of OpenAI.

asked       bodies of requests to prompts and `SamplingParams`, or why not
chat        messages to a prompt
answer      events of the engine to what clients read
loop        the engine's loop, which takes requests of all clients
connection  a client's, in a thread of its own; server: where they come in
run         all of it, from the first request to the last
"""

from megatron_hybrid.generation.serving.run import serve
from megatron_hybrid.generation.serving.server import Server

__all__ = ["Server", "serve"]
