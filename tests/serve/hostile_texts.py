"""Texts, more than 120, that would do something if a page took them for anything else than text.

What they would do can be seen: a dialog, the global `pwned`, or a request for /leak.
"""

# ruff: noqa: E501 - a row of a table stays one line

_RUN = "globalThis.pwned=1"
_TAGS = [
    f"<script>{_RUN}</script>", f"<SCRIPT>{_RUN}</SCRIPT>", f"<script type=module>{_RUN}</script>", "<script src=/leak></script>",
    f"</script><script>{_RUN}</script>", f"</textarea><script>{_RUN}</script>", f"</style><script>{_RUN}</script>",
    f"<scr<script>ipt>{_RUN}</scr</script>ipt>", f"<script\n>{_RUN}</script\n>", f"<script/x>{_RUN}</script>",
    f"<script>{_RUN}", f"<<script>{_RUN}//<</script>", f"--><script>{_RUN}</script>", f"]]><script>{_RUN}</script>",
    f"</title><script>{_RUN}</script>", f"<noscript><p title='</noscript><script>{_RUN}</script>'>",
    "<script>alert(1)</script>", "<script>fetch('/leak')</script>", "<iframe src=/leak></iframe>", "<object data=/leak></object>",
    "<embed src=/leak>", "<link rel=stylesheet href=/leak>", "<style>@import '/leak'</style>", "<base href=/leak/>",
    "<meta http-equiv=refresh content='0;url=/leak'>", "<form action=/leak><input name=a autofocus></form>",
    "<video src=/leak autoplay></video>", "<audio src=/leak autoplay></audio>", "<input type=image src=/leak>",
    "<template><img src=/leak></template>", "<picture><source srcset=/leak><img src=/leak></picture>", "<img src=/leak>",
    "<img srcset='/leak 1x'>", "<body background=/leak>", "<table background=/leak>", "<div style=background:url(/leak)>x</div>",
    "<frameset onload=alert(1)>", "<portal src=/leak>", "<dialog open>x</dialog>", "<x-element>x</x-element>",
]  # fmt: skip
_HANDLERS = [
    *[f"<img src=x on{event}={_RUN}>" for event in ("error", "load", "loadstart", "pointerenter")],
    f'"><img src=x onerror={_RUN}>', f"'><img src=x onerror={_RUN}>", f"` onerror={_RUN} `", f"<img src=x onerror='{_RUN}'",
    f"<img/src=x/onerror={_RUN}>", f"<img\tsrc=x\tonerror\t=\t{_RUN}>", f"<IMG SRC=x OnErRoR={_RUN}>",
    f"<body onload={_RUN}>", f"<body onpageshow={_RUN}>", f"<input autofocus onfocus={_RUN}>", f"<select autofocus onfocus={_RUN}>",
    f"<textarea autofocus onfocus={_RUN}>", f"<details open ontoggle={_RUN}>x</details>", f"<marquee onstart={_RUN}>x</marquee>",
    f"<video><source onerror={_RUN}></video>", f"<audio src=x onerror={_RUN}>", f"<iframe onload={_RUN}></iframe>",
    f"<style onload={_RUN}></style>", f"<link rel=stylesheet href=x onerror={_RUN}>",
    f"<p style='animation:a' onanimationstart={_RUN}>x</p>", f"<a href=# onclick={_RUN} autofocus tabindex=1>x</a>",
]  # fmt: skip
_SVG = [
    f"<svg onload={_RUN}>", f"<svg><script>{_RUN}</script></svg>", f"<svg><animate onbegin={_RUN} attributeName=x dur=1s>",
    f"<svg><set onbegin={_RUN} attributeName=x to=1>", "<svg><image href=/leak /></svg>", "<svg><use href='/leak#x'/></svg>",
    "<svg><a xlink:href=javascript:alert(1)><text y=20>x</text></a></svg>", f"<svg><style><img src=x onerror={_RUN}></style></svg>",
    f"<math><mtext></mtext><mglyph><style><img src=x onerror={_RUN}>", f"<svg><foreignObject><img src=x onerror={_RUN}></foreignObject>",
    "<svg/onload=alert(1)//", f"<svg><title><img src=x onerror={_RUN}></title></svg>",
]  # fmt: skip
_URLS = [
    "javascript:alert(1)", "<a href=javascript:alert(1)>x</a>", "[x](javascript:alert(1))", "![x](/leak)", "![x](http://127.0.0.1/leak)",
    "<javascript:alert(1)>", "data:text/html,<script>alert(1)</script>", "<iframe src='data:text/html,<script>alert(1)</script>'>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>", "vbscript:msgbox(1)", "<a href='java\tscript:alert(1)'>x</a>",
    "[x]: javascript:alert(1)\n[x]", "http://127.0.0.1/leak", "<https://127.0.0.1/leak>", "//127.0.0.1/leak",
]  # fmt: skip
_TEMPLATES = [
    "{{constructor.constructor('pwned=1')()}}", "${globalThis.pwned=1}", "#{7*7}", "<%= 7*7 %>", "{% for x in y %}", "{{7*7}}",
    "[[7*7]]", "@(1+2)", "`${alert(1)}`", "</template>{{x}}", "__proto__", '{"__proto__": {"pwned": 1}}', "%3Cscript%3Ealert(1)%3C/script%3E",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;img src=x onerror=alert(1)&#62;", "\\u003cscript>alert(1)\\u003c/script>",
    "\\x3cimg src=/leak>", "data: [DONE]\n\ndata: x", "\n\nevent: error\ndata: {}\n\n.", ": comment\n.",
]  # fmt: skip
_LETTERS = [
    "a\u202egpj.exe\u202c b", "\u202e\u202d\u202b never closed", "\u2066\u2067\u2068 never closed", "\u200f\u061c\u200eשלום abc",
    "a\0b", "\0<script>alert(1)</script>", "<scr\0ipt>alert(1)</script>", "a\x1b[2Jb\x07\x08", "\ufeff<b>x</b>", "\ufffe\uffff x",
    "\ud800 alone", "alone \udc00 <img src=/leak>", "a" + "\u0301" * 400, "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f" * 20, "🙂" * 200,
    "👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈", "\u2028\u2029 lines", "\x85\xa0\u3000 spaces .", "<" * 500, "<b>" * 200 + "deep", "x" * 5000,
    "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e", "+ADw-script+AD4-alert(1)+ADw-/script+AD4-", "<!--", "<!-- --!><img src=/leak>",
    "<![CDATA[", "<?xml version='1.0'?>", "<!doctype html><html><body>", "</div></article></section></main></body></html>", "<plaintext>", "</",
]  # fmt: skip
HOSTILE_TEXTS = list(dict.fromkeys([*_TAGS, *_HANDLERS, *_SVG, *_URLS, *_TEMPLATES, *_LETTERS]))
