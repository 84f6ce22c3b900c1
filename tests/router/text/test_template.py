import pytest

from services.router.text.model_text import ModelText
from services.router.text.template import ChatTemplate, TemplateError
from services.wire.messages import TextAssets
from tests.fakes import byte_text_assets

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Writes thoughts of the last assistant message only, as Qwen3's template does.
UNSTABLE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content and loop.last %}<{{ m.reasoning_content }}>{% endif %}{{ m.content }};"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def test_renders_as_transformers_does():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": "Be <b>brief</b> & kind."}, user("Hé?"), assistant("Yes.")]
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b", "parameters": {"x": 1}}}]
    source = "{% if tools %}{{ tools | tojson(indent=2) }}\n{% endif %}" + CHATML
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True
    )
    assert ChatTemplate(source, {}).render(messages, tools) == theirs[0]


def test_special_tokens_and_the_clients_variables_are_there():
    template = ChatTemplate("{{ bos_token }}{{ enable_thinking }}", {"bos_token": "<s>"})
    assert template.render([user("x")], extra={"enable_thinking": False}) == "<s>False"


def test_generation_blocks_and_loop_controls_work():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert ChatTemplate(source, {}).render([user("a"), user("b")]) == "a"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ range(10**9) | length }}", "too big|Range"),
    ],
)
def test_failures_and_escapes_become_one_kind_of_error(source, reason):
    with pytest.raises(TemplateError, match=reason):
        ChatTemplate(source, {}).render([user("x")])


def test_a_template_that_does_not_compile_is_refused_when_it_arrives():
    with pytest.raises(ValueError, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})


def test_strftime_now_is_there():
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]).isdigit()


# ---- where messages begin ----------------------------------------------------------------------------


def starts(source, messages, wanted):
    template = ChatTemplate(source, {})
    whole = template.render(messages)
    return whole, template.message_starts(wanted, whole, messages, None, None)


def test_message_starts_split_the_prompt_at_messages():
    messages = [{"role": "system", "content": "S"}, user("U"), assistant("A")]
    whole, (first, second, third, end) = starts(CHATML, messages, [0, 1, 2, 3])
    assert first == 0
    assert whole[second:third] == "<|im_start|>user\nU<|im_end|>\n"
    assert whole[third:].startswith("<|im_start|>assistant\nA")
    assert end == len(whole)


def test_starts_stay_ordered_and_inside_when_the_template_rewrites_earlier_messages():
    messages = [user("U"), assistant("A", reasoning_content="hm"), user("V")]
    whole, found = starts(UNSTABLE, messages, [0, 1, 2, 3])
    assert found == sorted(found)
    assert whole[: found[1]] == "[user]U;"
    assert whole[found[1] :].startswith("[assistant]")
    assert found[2] <= whole.index("[user]V")


def test_a_template_that_refuses_partial_conversations_leaves_the_boundary_before():
    source = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}"
        "{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    _, found = starts(source, [user("aa"), assistant("bb"), user("cc")], [0, 1, 2, 3])
    assert found == [0, 3, 3, 9]


def test_chat_prompts_give_message_starts_in_tokens():
    text = ModelText(byte_text_assets(), 260)
    messages = [{"role": "system", "content": "S" * 10}, user("U")]
    plain = text.encode_chat(messages, None, None)
    marked = text.encode_chat(messages, None, None, starts_of=[0, 1, 2])
    assert marked.tokens == plain.tokens
    assert marked.starts == [0, len("_system\n" + "S" * 10 + "_\n"), len(plain.tokens)]


def test_a_model_without_a_template_refuses_chat():
    assets = byte_text_assets()
    text = ModelText(TextAssets(tokenizer=assets.tokenizer, chat_template=None), 260)
    with pytest.raises(TemplateError, match="no chat template"):
        text.encode_chat([user("x")], None, None)
