"""`posttrain export`: a policy as a folder for other tools.

    hf        the adapter folded into its base (`models/merge.py`): transformers, vLLM, converters to GGUF
    peft      the adapter alone, byte for byte as it was trained, with tokenizer, chat template and how to load it
    ollama    what `hf` writes, and a `Modelfile`: template in Go's syntax, stop strings, BOS where the tokenizer adds none

Ollama's templates cannot trim: white space around a message, which our templates cut off, stays there. Its newest versions take
no adapters and run no safetensors of most architectures, so a `Modelfile` names no ADAPTER and tells how to come to a GGUF.
Left out: GGUF itself, quantised weights, Go templates of models that bring a Jinja template like none of ours.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from posttrain.artifacts import new_folder, write_json
from posttrain.data.chat import load_chat_format
from posttrain.errors import ArtifactError, ModelError, PosttrainError
from posttrain.models.adapter_config import ADAPTER_CONFIG
from posttrain.models.adapter_files import ADAPTER_WEIGHTS, read_adapter, whole_state
from posttrain.models.base_model import BaseModel
from posttrain.models.merge import write_merged, write_tokenizer
from posttrain.models.target import Target
from posttrain.records import Message

# The templates of data/chat.py in Go's syntax, without BOS; EOS is filled in.
GO_TEMPLATES = {
    "gemma": (
        '{{ $system := "" }}{{ range .Messages }}{{ if eq .Role "system" }}'
        '{{ if $system }}{{ $system = printf "%s\\n\\n%s" $system .Content }}{{ else }}{{ $system = .Content }}{{ end }}'
        '{{ else if eq .Role "user" }}<start_of_turn>user\n'
        '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}{{ .Content }}<end_of_turn>\n'
        '{{ else }}{{ if $system }}<start_of_turn>user\n{{ $system }}<end_of_turn>\n{{ $system = "" }}{{ end }}'
        "<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}"
        "{{ if $system }}<start_of_turn>user\n{{ $system }}<end_of_turn>\n{{ end }}<start_of_turn>model\n"
    ),
    "chatml": ("{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"),
    "llama3": (
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "plain": (
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n'
        '{{ else if eq .Role "user" }}Question: {{ .Content }}\n'
        "{{ else }}Answer: {{ .Content }}EOS\n{{ end }}{{ end }}Answer:"
    ),
}
# A model's own template that renders these as one of ours does is taken for it.
_USER, _ASSISTANT = Message("user", "a question"), Message("assistant", "an answer")
_PROBES = (
    (_USER,),
    (_USER, _ASSISTANT, Message("user", "another one")),
    (Message("system", "a rule"), _USER, _ASSISTANT, _USER, _ASSISTANT, _USER),
)
_MODELFILE = """\
# In this folder: ollama create NAME
# Where Ollama does not run safetensors of this architecture, convert the folder with llama.cpp first
# (convert_hf_to_gguf.py . --outfile model.gguf) and write FROM ./model.gguf here.
FROM .
TEMPLATE \"\"\"{template}\"\"\"
{stops}
"""
_README = """\
# {name}

A LoRA adapter in PEFT's format, trained with posttrain. It belongs to one base and answers nonsense on any other:

- base: `{model}`
- sha256 over its config and weights: `{weights_hash}`
- chat template: `{template}`, in `chat_template.jinja`
{where}
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.float32)
model = PeftModel.from_pretrained(base, ".").eval()
tokenizer = AutoTokenizer.from_pretrained(".")

messages = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**prompt, max_new_tokens=64, do_sample=False, eos_token_id={ends})
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def export_target(target: Target, to: str, out: Path) -> Path:
    """Write the target's policy in a format of `FORMATS` into the new folder `out`; whole or not at all.

    Raises ArtifactError for the base itself, for a folder that exists, for full weights as an adapter, for an adapter that
    PEFT would read otherwise, and where what was written answers otherwise; ModelError for a template that Ollama cannot have.
    """
    if target.policy == "base":
        raise ArtifactError("export", "the base itself has nothing to export", do="name a trained stage, RUN/STAGE")
    with new_folder(out) as folder:
        FORMATS[to](folder, target)
    return out


def _write_peft(folder: Path, target: Target) -> None:
    stage = target.policies.run / target.policy
    if not (stage / ADAPTER_WEIGHTS).exists():
        raise ArtifactError(
            str(stage), "has weights of its own, not an adapter", allowed="--to hf or --to ollama",
            do='train with [adapter] kind = "lora" for an adapter',
        )  # fmt: skip
    base = target.base
    # An adapter of another base, or a damaged one, is refused here.
    adapter = base.adapters.get(target.policies.activate(target.policy))
    experts = sorted(_names_of_experts(base) & {layer.rsplit(".", 1)[-1] for layer in adapter.weights})
    if experts:
        raise ArtifactError(
            str(stage), f"PEFT takes {', '.join(experts)} for the experts of this base, and leaves the adapter's layers out",
            allowed="--to hf", do="or train with [adapter] targets that are no names of experts",
        )  # fmt: skip
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        shutil.copyfile(stage / name, folder / name)
    if read_adapter(folder, where=f"adapter {folder}").fingerprint != adapter.fingerprint:
        raise ArtifactError(str(folder), "is not the adapter that was loaded", do="run the same command again")
    write_tokenizer(folder, base)
    model, where, place = base.source.model, "", base.source.model
    if ":" in model or model.endswith(".gguf"):
        place = f"models/{base.source.folder.name}"
        where = f"\n`{place}` is what posttrain made of it, in `~/.cache/posttrain` or `$POSTTRAIN_CACHE`.\n"
    text = _README.format(
        name=target.policy, model=model, weights_hash=base.source.weights_hash, template=base.chat.template_name,
        where=where, folder=place, ends=sorted(base.chat.end_ids),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def _names_of_experts(base: BaseModel) -> set[str]:
    """Last names of layers that the base's files have and transformers holds as parts of other tensors: experts."""
    in_memory = whole_state(base).keys()
    known = {*in_memory, *(name.partition(".")[2] for name in in_memory)}  # files may lack the prefix of the head's model
    stored: set[str] = set()
    for path in base.source.folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            stored |= set(file.keys())
    return {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in stored - known}


def _write_ollama(folder: Path, target: Target) -> None:
    base = target.base
    template = go_template(base)
    write_merged(folder, target)
    path = folder / "tokenizer_config.json"
    # Converters to GGUF read it there; where nothing is said some add a BOS of their own.
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": base.tokenizer.adds_bos})
    ends = [base.chat.decode([end], special=True) for end in sorted(base.chat.end_ids)]
    stops = "\n".join(f'PARAMETER stop "{end}"' for end in ends)
    (folder / "Modelfile").write_text(_MODELFILE.format(template=template, stops=stops), encoding="utf-8")


def go_template(base: BaseModel) -> str:
    """The base's chat template in Go's syntax, up to where the assistant speaks. Raises ModelError where it is none of ours."""
    chat = base.chat
    text = GO_TEMPLATES[_name_of(base)].replace("EOS", base.tokenizer.eos or "")
    adds = not base.tokenizer.adds_bos and chat.encode_prompt([_USER])[:1] == [chat.bos_id]
    return f"{base.tokenizer.bos}{text}" if adds else text


def _name_of(base: BaseModel) -> str:
    """Which of our templates the base is prompted by."""
    if base.chat.template_name in GO_TEMPLATES:
        return base.chat.template_name
    for name in GO_TEMPLATES:
        try:
            ours = load_chat_format(base.tokenizer, name)
            if all(ours.encode_prompt(probe) == base.chat.encode_prompt(probe) for probe in _PROBES):
                return name
        except PosttrainError:  # a vocabulary without the tokens, or a template without a system role
            continue
    raise ModelError(
        "--to ollama", "the model's own chat template is Jinja, and Ollama's are Go's", allowed=", ".join(GO_TEMPLATES),
        do="use --to hf and write TEMPLATE by hand",
    )  # fmt: skip


FORMATS: dict[str, Callable[[Path, Target], None]] = {"hf": write_merged, "peft": _write_peft, "ollama": _write_ollama}
