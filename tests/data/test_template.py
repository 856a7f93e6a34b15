"""A template is somebody else's code: payloads neither run nor stall, and what published templates use works."""
# ruff: noqa: E501 - a payload is one line

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.data import template
from posttrain.data.template import MAX_TEMPLATE_CHARS, RENDER_SECONDS, ChatTemplate
from posttrain.errors import DataError, ModelError
from posttrain.records import Message

TALK = (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi"))
SECRET = "tests-must-never-see-this"


def render(source: str, messages: tuple[Message, ...] = TALK, prompt: bool = False) -> str:
    return ChatTemplate(source).render(messages, generation_prompt=prompt, bos="<bos>", eos="<eos>")


# --- payloads: each ends in an error or in harmless text --------------------------------------------------------------

# Walks from a value that the template sees to Python itself. `{run}` is put in where a walk would end.
_RUN = "('os').system('echo " + SECRET + "')"
REACHING = {
    "subclasses": "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "subclasses of text": "{{ ''.__class__.__mro__[1].__subclasses__()[100]('id', shell=True) }}",
    "mro by item": "{{ ''['__class__']['__mro__'] }}",
    "split names": "{{ messages['__cl' ~ 'ass__']['__ba' ~ 'se__'] }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "map attribute": "{{ [messages]|map(attribute='__class__')|list }}",
    "map nested attribute": "{{ ['a']|map(attribute='__class__.__mro__')|list }}",
    "selectattr": "{{ [raise_exception]|selectattr('__globals__')|list }}",
    "sort by attribute": "{{ ['a', 'b']|sort(attribute='__class__.__name__') }}",
    "function globals": "{{ raise_exception.__globals__['sys'] }}",
    "function code": "{{ raise_exception.__code__.co_filename }}",
    "builtins": "{{ raise_exception.__builtins__.__import__" + _RUN + " }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.__builtins__.open('/etc/hostname').read() }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "namespace instance": "{% set n = namespace() %}{{ n._Namespace__attrs.__class__ }}",
    "dict": "{{ dict.__base__.__subclasses__() }}",
    "range": "{{ range.__globals__ }}",
    "range instance": "{{ range(1).__class__.__base__ }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "macro environment": "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "self": "{% block b %}{% endblock %}{{ self._TemplateReference__context.environment }}",
    "context": "{{ context.environment.loader }}",
    "self without blocks": "{{ self.__init__.__globals__.__builtins__ }}",
    "loop": "{% for m in messages %}{{ loop._iterable.__class__.__init__.__globals__ }}{% endfor %}",
    "generator frame": "{{ (messages|map('string')).gi_frame.f_back.f_builtins }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format kept": "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "format mapped": "{{ ['{0.__class__}']|map(attribute='format')|first }}",
    "percent format": "{{ '%(a)s' % {'a': messages} }}",
    "percent format of a function": "{{ '%s' % raise_exception }}",
    "safe format": "{{ ('{0.__class__}'|safe).format(messages) }}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "from import": "{% from 'subprocess' import run %}{{ run('id') }}",
    "extends": "{% extends '/etc/hostname' %}",
    "undefined": "{{ missing.__class__.__init__.__globals__ }}",
    "grow the messages": "{% set _ = messages.append(1) %}",
    "change a message": "{% set _ = messages[0].update({'role': 'x'}) %}",
    "environment": "{{ environment.__class__.__mro__ }}",
    "request": "{{ request.application.__globals__ }}",
}  # fmt: skip

_TWICE = "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(70) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
_BIG = "{% set a = 'a' * 4000000 %}"
STALLING = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}",
    "range of ranges": "{{ range(10 ** 12) }}",
    "exponent": "{{ 9 ** 9 ** 9 ** 9 }}",
    "exponent in steps": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "repeated text": "{{ 'a' * 10 ** 12 }}",
    "repeated list": "{{ [messages] * 10 ** 12 }}",
    "doubling text": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling sum": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "doubling list": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "list in itself, printed": _TWICE + "{{ n.a }}",
    "list in itself, compared": _TWICE + "{{ n.a == n.b }}",
    "list in itself, as JSON": _TWICE + "{{ n.a|tojson }}",
    "tuple in itself, as a key": _TWICE.replace("[n.a, n.a]", "(n.a, n.a)") + "{{ {n.a: 1} }}",
    "dict in itself": "{% set n = namespace(d={}) %}{% for i in range(70) %}{% set n.d = {'x': n.d, 'y': n.d} %}{% endfor %}{{ n.d }}",
    "arguments in themselves": (
        "{% set n = namespace(a=(1,)) %}{% macro m() %}{% set n.a = varargs %}{% endmacro %}"
        "{% for i in range(70) %}{{ m(n.a, n.a) }}{% endfor %}{{ n.a }}"
    ),
    "named arguments in themselves": (
        "{% set n = namespace(a={}) %}{% macro m() %}{% set n.a = kwargs %}{% endmacro %}"
        "{% for i in range(70) %}{{ m(x=n.a, y=n.a) }}{% endfor %}{{ n.a }}"
    ),
    "namespace in itself": "{% set n = namespace(a=0) %}{% for i in range(70) %}{% set n.a = namespace(x=n.a, y=n.a) %}{% endfor %}{{ n.a }}",
    "deep list as indented JSON": "{% set n = namespace(a=[]) %}{% for i in range(900) %}{% set n.a = [n.a] * 2 %}{% endfor %}{{ n.a|tojson(16) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion that forks": "{% macro m(i) %}{% if i %}{{ m(i - 1) }}{{ m(i - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for m in [messages] recursive %}{{ loop([m]) }}{% endfor %}",
    "block in itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace of safe text": "{{ (('a' * 2000)|safe).replace('a', 'b' * 4000000) }}",
    "replace of escaped text": "{% autoescape true %}{% set x %}{{ 'a' * 2000 }}{% endset %}{{ x.replace('a', 'b' * 4000000) }}{% endautoescape %}",
    "join": "{{ ('x' * 100000).join(['y'] * 90000) }}",
    "join filter": "{{ range(99999)|join('x' * 100000) }}",
    "one text many times": _BIG + "{{ [a] * 90000 }}",
    "searching": _BIG + "{% for i in range(99999) %}{{ a.count('aab') }}{% endfor %}",
    "split": "{{ ('ab' * 2000000).split('b')|length }}",
    "sorting": "{% for i in range(99999) %}{{ range(99999)|sort(reverse=true)|first }}{% endfor %}",
    "mapping": _BIG + "{{ (['b'] * 90000)|map('replace', 'b', a)|list|length }}",
    "membership": "{% set l = range(99999)|list %}{% for i in range(99999) %}{{ 'x' in l }}{% endfor %}",
    "errors that Jinja swallows": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[namespace()] %}{% endfor %}{% endfor %}",
    "indent": "{{ ('a\n' * 2000000)|indent(64) }}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "zeros": "{{ 'a'.zfill(10 ** 10) }}",
    "centring": "{{ 'a'.center(10 ** 10) }}",
    "tabs": "{{ ('\t' * 4000).expandtabs(1000000) }}",
    "wide percent format": "{{ '%99999999999d' % 1 }}",
    "wide format": "{{ '{:>99999999999}'.format(1) }}",
    "wide format, mapped": "{% for f in ['{:>99999999999}']|map(attribute='format') %}{{ f(1) }}{% endfor %}",
    "wide format of a map": "{{ '{a:>99999999999}'.format_map({'a': 1}) }}",
    "digits": "{{ ('9' * 4000000)|int }}",
    "binary digits": "{{ ('1' * 4000000)|int(0, 2) }}",
    "digits of a float": "{{ ('9' * 4000000)|float }}",
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "brackets": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "signs": "{{ " + "-" * 60000 + "1 }}",
    "blocks": "{% if 1 %}" * 2500 + "{% endif %}" * 2500,
    "a long source": "a" * (MAX_TEMPLATE_CHARS + 1),
}  # fmt: skip
PAYLOADS = REACHING | STALLING


@pytest.fixture(scope="module")
def events() -> Iterator[list[str]]:
    """What Python's audit hook sees of this thread while a payload is rendered: imports, files, processes."""
    seen: list[str] = []
    me = threading.get_ident()
    on = True

    def hook(event: str, _: tuple[object, ...]) -> None:
        if (
            on
            and threading.get_ident() == me
            and event.split(".")[0] in ("open", "os", "subprocess", "import", "socket", "exec")
        ):
            seen.append(event)

    sys.addaudithook(hook)
    yield seen
    on = False


def outcome(source: str, events: list[str]) -> str:
    """The text of a payload or its error in words; whatever it did to the world stays in `events`."""
    try:
        template = ChatTemplate(source)
    except ModelError as error:
        return str(error)
    finally:
        events.clear()  # making the compiled functions is an "exec" event; nothing of the template has run yet
    try:
        return template.render(TALK, generation_prompt=True, bos="<bos>", eos="<eos>")
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", REACHING)
def test_a_payload_reaches_nothing(name: str, events: list[str]):
    said = outcome(REACHING[name], events)
    assert not events
    assert SECRET not in said
    refused = said.startswith("chat template · ")
    assert refused or not any(mark in said for mark in ("<class", "<function", "<built-in", "<module", "object at 0x", "root:"))


# Their values are within the limits: these are rendered, and the others are refused.
RENDERED = {"exponent", "namespace in itself", "digits", "binary digits", "digits of a float"}


@pytest.mark.parametrize("name", STALLING)
def test_a_payload_ends(name: str, events: list[str]):
    said = outcome(STALLING[name], events)
    assert not events
    assert said.startswith("chat template · ") == (name not in RENDERED)
    assert len(said) < 20_000


# Each of them asks for gigabytes, in steps that are small or at once.
_MANY = "{% set a = 'a' * 4000000 %}{% macro m() %}{% for i in range(99999) %}"
LARGE = {
    "bytes": "{{ (1).to_bytes(2000000000, 'big') | length }}",
    "padded bytes": "{{ (1).to_bytes(1, 'big').ljust(2000000000) | length }}",
    "tabs of bytes": "{{ (9).to_bytes(1, 'big').expandtabs(2000000000) | length }}",
    "blank lines": "{% set a = '\\n' * 4000000 %}{{ a | indent(64, true, true) | length }}",
    "mapped texts": _BIG + "{{ (['b'] * 90000) | map('replace', 'b', a) | list | length }}",
    "joined texts": _BIG + "{{ (['b'] * 90000) | map('replace', 'b', a) | join | length }}",
    "kept slices": _MANY + "{{ a[i:] }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "kept texts": _MANY + "{{ a ~ i }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "kept copies": _MANY + "{{ a.replace('b', i | string) ~ a.upper() }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "letters": "{% set a = '漢' * 4000000 %}{{ a | sort | length }}{{ a | list | length }}",
    "letters of a map": "{% set a = '漢' * 4000000 %}{{ a | map('upper') | list | length }}",
    "pieces": "{% set a = 'ab' * 2000000 %}{{ a.split('b') | length }}",
    "words": "{% set a = 'a ' * 2000000 %}{{ a.split() | length }}{{ a | title | length }}",
    "lines": "{% set a = '\\n' * 4000000 %}{{ a.splitlines() | length }}",
    "a search backwards": _BIG + "{{ a.rfind('a' * 1000000 ~ 'b' ~ 'a' * 1000000) }}",
    "stripped letters": _BIG + "{{ a.strip('é' * 4000000 ~ 'a') }}{{ a | trim('é' * 4000000 ~ 'a') }}",
    "a number in letters": "{{ (2 ** 4000) ** 4000 }}",
    "a container as text": "{% set a = ['\\x00' * 4000000] %}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}",
    "indented JSON": (
        "{% set n = namespace(a=[]) %}{% for i in range(300) %}{% set n.a = [n.a, 1] %}{% endfor %}{{ ([n.a] * 90) | tojson(16) }}"
    ),
    "half of a character": "{{ '\\ud800' }}",
}  # fmt: skip


def test_nothing_large_is_made():
    """In a process of its own: what it grew by, and what each of them came to."""
    code = """
import json, resource, sys
from posttrain.data.template import ChatTemplate
from posttrain.errors import DataError
from posttrain.records import Message

before, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for name, source in json.load(sys.stdin).items():
    try:
        ChatTemplate(source).render((Message("user", "Hi"),), generation_prompt=True, bos="", eos="")
    except DataError as error:
        said[name] = error.found
print(json.dumps([(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, said]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(LARGE), capture_output=True, text=True, timeout=300, check=True
    )
    grown, said = json.loads(done.stdout)
    assert said.keys() == LARGE.keys()
    assert not [name for name, found in said.items() if "MemoryError" in found]
    assert grown < 400, "MiB"


@pytest.mark.parametrize("count", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_templates_end_and_stay_small(count: int):
    fuzz = Path(__file__).with_name("fuzz_templates.py")
    done = subprocess.run(
        [sys.executable, str(fuzz), str(count), "5"], capture_output=True, text=True, timeout=60 + count, check=True
    )
    rendered, refused, _, out_of_memory, grown = map(int, done.stdout.split())
    assert rendered > 0
    assert refused > count // 4
    assert out_of_memory == 0
    assert grown < 400, "MiB"


def test_0_of_96_payloads_execute_or_stall():
    """The count of the two tests above: that each of them came back is what they assert."""
    assert (len(REACHING), len(STALLING), len(PAYLOADS)) == (43, 53, 96)


def test_time_is_up_in_any_thread():
    said: list[str] = []
    source = STALLING["nested loops"]
    thread = threading.Thread(target=lambda: said.append(outcome(source, [])))
    thread.start()
    thread.join(60)
    assert said == ["chat template · refuses the conversation: took longer than 0.1 s · change the row or set [base] template"]


def test_a_render_leaves_the_callers_tracing_as_it_was():
    before = sys.gettrace()
    outcome(STALLING["nested loops"], [])
    render("{{ messages[0].role }}")
    assert sys.gettrace() is before


def test_threads_render_at_once_while_somebody_listens_to_audit_events():
    """Python then gives way to another thread in the middle of installing a trace function, and refuses that one its own."""
    code = """
import sys, threading
from posttrain.data.template import ChatTemplate
from posttrain.records import Message

sys.setswitchinterval(1e-6)
sys.addaudithook(lambda name, given: None)
template, found = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"), []

def work():
    try:
        for _ in range(400):
            found.append(template.render((Message("user", "Hi"),), generation_prompt=False, bos="", eos=""))
    except Exception as error:
        found.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found), sorted(set(found)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "3200 ['Hi']\n"


def test_messages_stay_as_they_were():
    outcome(REACHING["change a message"], [])
    assert TALK[0] == Message("system", "Be brief.")


# --- what published templates use -------------------------------------------------------------------------------------

ORDINARY = {
    "loop variables": ("{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }} {% endfor %}", "1TrueFalse 2FalseFalse 3FalseTrue "),
    "loop with a filter": ("{% for m in messages if m.role != 'system' %}{{ m['role'] }},{% endfor %}", "user,assistant,"),
    "break and continue": ("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "Be brief."),
    "namespace": ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
    "slices": ("{% set rest = messages[1:] %}{{ rest|length }}{{ messages[-1]['content'] }}{{ messages[::-1][0].role }}", "2Hiassistant"),
    "whitespace control": ("a  {%- if true -%}  b  {%- endif %}  c", "ab  c"),
    "trimmed blocks": ("{% if true %}\n  x\n{% endif %}\ny\n", "  x\ny\n"),
    "filters": ("{{ '  a ' | trim }}{{ 'b' | upper }}{{ [1, 2] | join('-') }}{{ none | default('d', true) }}", "aB1-2d"),
    "selectattr": ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | first }}", "Hello"),
    "tests": ("{{ x is defined }}{{ messages is iterable }}{{ 'a' is string }}{{ messages[0] is mapping }}{{ none is none }}", "FalseTrueTrueTrueTrue"),
    "string methods": ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}{{ 'x'.startswith('x') }}{{ ' y'.strip() }}", "bTruey"),
    "methods in a loop": ("{% for m in messages %}{{ m.content.split(' ')[0].strip('.') }}{{ m.content.split(sep='e', maxsplit=1) | length }}{% endfor %}", "Be2Hello2Hi1"),
    "tojson": ("{{ {'a': 'é', 'b': [1, true]} | tojson }}", '{"a": "é", "b": [1, true]}'),
    "indented tojson": ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    "tuples in a loop": ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{% set a, b = 1, 2 %}{{ b }}{{ (1,) + (2,) }}", "a=12(1, 2)"),
    "macro": ("{% macro turn(m, end='!') %}{{ m.role }}{{ end }}{% endmacro %}{{ turn(messages[1]) }}{{ turn(messages[2], end='') }}", "user!assistant"),
    "call block": ("{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}x{% endcall %}", "[x]"),
    "block set": ("{% set x %}<{{ bos_token }}>{% endset %}{{ x ~ eos_token }}", "<<bos>><eos>"),
    "generation tag": ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}", "Hi<eos>"),
    "generation prompt": ("{% if add_generation_prompt %}go{% else %}stop{% endif %}", "stop"),
    "no tools": ("{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}", "none"),
    "strftime guard": ("{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}no date{% endif %}", "no date"),
    "arithmetic": ("{{ 7 % 2 }}{{ 2 ** 3 }}{{ 7 // 2 }}{{ (loop_count | default(3)) - 1 }}", "1832"),
    "escapes": ("{{ '<b>' | safe ~ '<i>' }}{{ '<' | e }}", "<b><i>&lt;"),
    "autoescape stays off": ("{{ '<think>' }}", "<think>"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_what_published_templates_use_works(name: str):
    source, text = ORDINARY[name]
    assert render(source) == text


def test_raise_exception_speaks_to_the_user():
    with pytest.raises(DataError) as error:
        render("{{ raise_exception('Roles must alternate') }}")
    assert str(error.value) == (
        "chat template · refuses the conversation: Roles must alternate · change the row or set [base] template"
    )


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 + }}", "{% nonsense %}", "{{ x|nofilter }}", "{% if true %}"])
def test_a_source_that_is_no_template_is_refused(source: str):
    with pytest.raises(ModelError, match=r"chat template · not a valid template: .* · set \[base\] template"):
        ChatTemplate(source)


def test_a_pause_that_is_not_the_templates_refuses_nothing():
    """A collection of garbage spends the template's time once, on the thread that renders."""
    paused: list[float] = []
    outside = sys.gettrace()

    def pause(phase: str, _: dict) -> None:
        if phase == "start" and not paused and sys.gettrace() is not outside:
            paused.append(time.thread_time())
            while time.thread_time() < paused[0] + 2 * RENDER_SECONDS:
                pass

    source = "{% set n = namespace(all=[]) %}{% for i in range(99) %}{% set n.all = n.all + [[i]] %}{% endfor %}{{ bos_token }}"
    template, before = ChatTemplate(source), gc.get_threshold()
    gc.callbacks.append(pause)
    gc.set_threshold(20)
    try:
        assert template.render(TALK, generation_prompt=False, bos="<bos>", eos="") == "<bos>"
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(pause)
    assert paused


def test_the_time_limit_ends_no_frame_outside_of_the_template():
    """A finalizer that a garbage collection runs during rendering is such a frame; this test's own is another."""
    ended = template._Deadline(-1.0)
    assert [ended(sys._getframe(), "call", None) for _ in range(100)] == [None] * 100
