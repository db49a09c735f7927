"""Chat templates of the forms that models have, and a tokenizer for them."""

import json
from pathlib import Path

from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from tests.data.tokenizer_files import FAST_KINDS, save_kind

# ChatML, as of Qwen, without and with marks of what is generated.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED_CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- '<think>' + message.reasoning_content + '</think>' }}
            {%- endif %}
            {{- message.content | default('') }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>' }}{{ call.function | tojson }}{{ '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}"""
# As of Llama 3: a token at the beginning, trimmed texts, a refusal of roles in another order.
MARKED_LLAMA = """{{ bos_token }}
{%- set names = namespace(last='') %}
{%- for message in messages %}
    {%- if message['role'] == names.last %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {%- set names.last = message['role'] %}
    {{- '[INST]' + message['role'] + '\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}{{ message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}"""
LLAMA = MARKED_LLAMA.replace("{%- generation %}", "{%- if true %}").replace(
    "endgeneration", "endif"
) + ("{%- if add_generation_prompt %}{{ '[INST]assistant\\n\\n' }}{% endif %}")
# As of Nemotron Nano 2: what is thought is left out of turns, and begun in the generation prompt.
NEMOTRON = """{%- set ns = namespace(think=true) %}
{%- for message in messages %}
    {%- if '/no_think' in message.content %}{% set ns.think = false %}{% endif %}
{%- endfor %}
{{- '<|im_start|>System\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content.strip() }}{% endif %}
{{- '\\n' }}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].replace('/no_think', '').strip() %}
    {%- if message.role == 'assistant' %}
        {{- '[INST]Assistant\\n' + content + '\\n<|im_end|>\\n' }}
    {%- elif message.role != 'system' %}
        {{- '[INST]' + message.role | capitalize + '\\n' + content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[INST]Assistant\\n' + ('<think>\\n' if ns.think else '<think></think>') }}
{%- endif %}"""
MARKED_NEMOTRON = NEMOTRON.replace(
    "{{- '[INST]Assistant\\n' + content + '\\n<|im_end|>\\n' }}",
    "{{- '[INST]Assistant\\n' }}"
    "{%- generation %}{{- content + '\\n<|im_end|>\\n' }}{%- endgeneration %}",
)


def tokenizer_folder(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level tokenizer with a template, as a file of its own; gives the folder."""
    save_kind(FAST_KINDS["gpt2"](), folder)
    named = {"eos_token": "</s>", "bos_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def tokenizer_for_chats(folder: Path) -> Tokenizer:
    """As `data tokenize --chat` opens it."""
    return build_tokenizer("huggingface", folder, parse_special_tokens=True)
