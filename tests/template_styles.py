"""Chat templates written after what published models do, each with a habit that a renderer must see."""
# ruff: noqa: E501 - a line of a template stays one line

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
STYLES = {
    # Reasoning of turns before the last question is dropped; later turns get an empty one.
    "drops reasoning": (
        "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        "{%- for m in messages -%}{%- set content = m.content -%}{{- '<|im_start|>' + m.role + '\n' -}}"
        "{%- if m.role == 'assistant' -%}{%- set said = content.split('</think>')[-1].lstrip('\n') -%}"
        "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in content else '' -%}"
        "{%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}{{- said -}}"
        "{%- else -%}{{- content -}}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    # Reasoning is dropped of every turn, and an answer begins with one.
    "answers with reasoning": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "system first or never": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% if system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + ASKS
    ),
    "no system role, without a word": "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS,
    "refuses system messages": "{% if messages and messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML + ASKS,
    "roles alternate": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "system into the last question": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last or (loop.nextitem.role == 'assistant' and loop.index == messages | length - 1) %}{{ ns.system }}{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "system into the first question": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ (system if loop.first else '') + m.content.strip() }} [/INST]{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "only the last system message": (
        "{% for m in messages %}{% if m.role == 'system' %}{% set keep = m.content %}{% endif %}{% endfor %}{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}{% endif %}{% endfor %}"
        "{{ ns.s }}\n{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
    ),
    "a default system message": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML + ASKS,
    "the first hundred letters": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:100] }}<|im_end|>\n{% endfor %}" + ASKS,
    "every turn has a number": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ loop.index }}: {{ m.content }}<|im_end|>\n{% endfor %}" + ASKS,
    "the count stands first": "{{ messages | length }}\n" + CHATML + ASKS,
    "white space becomes one space": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split() | join(' ') }}<|im_end|>\n{% endfor %}" + ASKS,
    "a blank line but after the last": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}{{ '\n\n' if not loop.last }}{% endfor %}{% if add_generation_prompt %}\n\nassistant:{% endif %}",
}  # fmt: skip
