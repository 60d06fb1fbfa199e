"""Writes tests/oracles/text: small tokenizers of the styles that the families have, and what transformers makes of texts
and chats with them.

Needs tokenizers 0.23.3, transformers 5.24.0 and jinja2 3.1.6 (no torch). Run it in the repository's root.
"""

import json
import pathlib
import shutil

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
import transformers

OUT = pathlib.Path("tests/oracles/text")
WORDS = "the model of experts routes each token to a few of them and adds what they say in order Hello world 1234"

# Each family cuts text before it merges. These say the same in their own words.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = r"[一-龥぀-ゟ゠-ヿ]+"

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}\n"
    "        {{- raise_exception('no such role: ' + message.role) }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)

# The last question, found from the end, as templates of reasoning models do.
REASONING = """{%- set ns = namespace(last=-1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools|tojson }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {{- '\\n<call>' }}{{ {'name': call.function.name, 'arguments': call.function.arguments}|tojson }}{{ '</call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + ('' if loop.index0 != ns.last else ' (asks)') + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

INST = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only users and assistants') }}
    {%- endif %}
{%- endfor %}
"""

PHI = """{% for message in messages %}
  {% if message['role'] == 'system' and message['content'] %}
{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}
  {% elif message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}
  {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' }}
{% else %}
{{ eos_token }}
{% endif %}"""

CHANNELS = """{%- macro typed(spec) -%}
    {%- if spec.type == "array" -%}{{ typed(spec['items']) + '[]' }}
    {%- elif spec.enum is defined -%}{{ '"' + spec.enum|join('" | "') + '"' }}
    {%- else -%}{{ spec.type }}{%- if spec.default is defined %} // default: {{ spec.default }}{% endif %}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}{%- continue -%}{%- endif -%}
    {{- "<|im_start|>" + message.role }}
    {%- if message.specs is defined %}
        {%- for name, spec in message.specs.items() %}
            {{- "\n" + name + ": " + typed(spec) }}
        {%- endfor %}
    {%- endif %}
    {{- "<|im_start|>" ~ (message.content or "") ~ "<|im_end|>" -}}
    {%- if message.stop %}{%- break %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant" }}{%- endif -%}
"""

# What a value looks like when a template prints it, and what transformers' own filter makes of it.
VALUES = """{% for message in messages %}
{{ message.value }}|{{ message.value|string }}|{{ message.value|tojson }}|{{ message.value|tojson(indent=2) }}
{{ message.value|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
{% endfor %}
{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ nothing is defined }} {{ sep_token is defined }}
{{ "{% generation %}" }}{# {% generation %} #}{% raw %}{% generation %}{% endraw %}
"""

CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Who are you?\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three\n"},
    ],
    [{"role": "user", "content": "call"}, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "find", "arguments": {"text": "naïve <b>", "at": [1, 2.5, True, None]}}}]}],
    [{"role": "gods", "content": "no"}],
]
SPECS = [
    [
        {"role": "user", "content": "x", "specs": {
            "zeta": {"type": "array", "items": {"type": "string"}}, "alpha": {"enum": ["b", "a"]},
            "count": {"type": "integer", "default": 3}, "flag": {"type": "boolean", "default": True}}},
        {"role": "tool", "content": "left out"},
        {"role": "assistant", "stop": True},
        {"role": "user", "content": "never"},
    ],
]
PRINTED = [
    [{"role": "user", "value": value} for value in [
        True, False, 3, -7, 1.0, 0.1, 1e22, 1.5e-7, -2.5, "a'b\"c\\\n\u00e9\U0001f600", [1, "a", True, 2.0], [],
        {"z": 1, "a": {"b": [1.5, "it's"]}}, {}, "</script>&\x7f\x01"]],
]

TEXTS = [
    "", "Hello", "Hello, world", "  two  spaces\n\n\tand tabs ", "it's WE'RE I'll 1234567 3.14", "naïve Привет 你好",
    "emoji 🙂 and 👩‍👩‍👧 and 🏳️‍🌈", "real \ufffd replacement \ufffd", "<|im_start|>user<|im_end|>", "tail of spaces   ",
    "a\r\nb\r\n\r\nc", "ＦＵＬＬ ①", "\u2581 is a bar", "x<mask> y",
]


def byte_letters():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def merges_of(vocab, words):
    """Merges, from left to right, that make each word."""
    merges = []
    for word in words:
        pieces = list(word)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pieces[0] not in vocab:
                vocab[pieces[0]] = len(vocab)
                merges.append(pair)
    return merges


def byte_level(pre_tokenizer, special, post=None, normalizer=None):
    vocab = {token: i for i, token in enumerate(special)}
    for letter in byte_letters():
        vocab[letter] = len(vocab)
    words = WORDS.split()
    merges = merges_of(vocab, words + ["Ġ" + word for word in words])
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    if post:
        tokenizer.post_processor = post
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def split(*patterns, trailing=True):
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(cuts + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not trailing)])


def sentencepiece_like(special, more=()):
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"])}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in "▁" + "".join(sorted(set(WORDS.replace(" ", "")))) + ",.'":
        vocab[letter] = len(vocab)
    words = WORDS.split()
    merges = merges_of(vocab, words + ["▁" + word for word in words])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ["<unk>", "<s>", "</s>"]])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens(list(more))
    return tokenizer


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write(name, tokenizer, config, chats, jinja=None):
    folder = OUT / name
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder)
    texts = []
    for text in TEXTS:
        ids = loaded.encode(text)
        texts.append({"text": text, "ids": ids, "decoded": loaded.decode(ids, skip_special_tokens=True)})
    rendered = []
    for messages in chats:
        for prompt in (False, True):
            entry = {"messages": messages, "add_generation_prompt": prompt}
            try:
                entry["text"] = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                entry["ids"] = loaded.encode(entry["text"], add_special_tokens=False)
            except Exception as error:
                entry["error"] = str(error)
            rendered.append(entry)
    oracle = {
        "versions": {"transformers": transformers.__version__, "tokenizers": __import__("tokenizers").__version__},
        "texts": texts,
        "chats": rendered,
    }
    (folder / "oracle.json").write_text(json.dumps(oracle, indent=1, ensure_ascii=True) + "\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    plain = processors.ByteLevel(trim_offsets=False)
    write("o200k", byte_level(split(O200K), CONTROL, plain), ends | {"chat_template": CHANNELS}, SPECS + CHATS[:1])
    write("qwen", byte_level(split(QWEN), CONTROL, plain, normalizers.NFC()), ends, CHATS, jinja=REASONING)
    deepseek = byte_level(split(r"\p{N}{1,3}", CJK, QWEN), CONTROL, plain)
    write("deepseek", deepseek, ends | {"add_bos_token": True, "add_eos_token": False,
          "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]}, CHATS)
    gpt2 = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), CONTROL)
    gpt2.enable_truncation(4)
    gpt2.enable_padding(length=8)
    write("gpt2", gpt2, ends | {"chat_template": VALUES}, PRINTED)
    write("mixtral", sentencepiece_like([]), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
          "chat_template": INST}, CHATS)
    phi = sentencepiece_like(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], [AddedToken("<mask>", lstrip=True)])
    end = phi.token_to_id("<|end|>")
    # The configuration says more of a token than tokenizer.json, and adds one.
    write("phi", phi, {"bos_token": "<s>", "eos_token": "<|end|>", "add_bos_token": False, "mask_token": "<late>",
          "added_tokens_decoder": {str(end): {"content": "<|end|>", "lstrip": False, "rstrip": True, "normalized": False,
                                              "single_word": False, "special": True}}, "chat_template": PHI}, CHATS)


main()
