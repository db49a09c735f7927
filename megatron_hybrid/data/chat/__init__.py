"""Conversations to ids, and which of them a model is to learn.

conversation  an object of JSON, with the keys that people use, to messages
misrendered   what a template makes of values that it was not written for
template      messages to text, by the tokenizer's own Jinja template, in a sandbox
encoder       text to ids, and the tokens of assistant turns among them
"""

from megatron_hybrid.data.chat.encoder import ChatEncoder

__all__ = ["ChatEncoder"]
