import datetime as dt

import pytest

from llmopt.optimizer.chat_template import ChatTemplate
from llmopt.optimizer.errors import InputError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is "<b>"? ünïcode'},
    {"role": "assistant", "content": "A tag."},
    {"role": "user", "content": "And 1 < 2?"},
]

TEMPLATES = [
    "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% continue %}{% endif %}\n"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}",
    "{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}{{ extra }}",
    "{% if add_generation_prompt %}go{% else %}stay{% endif %}{{ eos_token }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(template, add_generation_prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        [MESSAGES],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        extra="more",
        **special,
    )
    ours = ChatTemplate(template, special).render(MESSAGES, add_generation_prompt=add_generation_prompt, extra="more")
    assert ours == expected[0]


def test_the_date_is_at_hand():
    rendered = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])
    assert rendered == str(dt.datetime.now().year)


def test_what_a_template_refuses_is_an_input_error():
    refusing = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(refusing, {})
    with pytest.raises(InputError, match="no tools here"):
        template.render([{"role": "tool", "content": "4"}])


@pytest.mark.parametrize("template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% for %}"])
def test_a_template_cannot_reach_out_of_its_sandbox(template):
    with pytest.raises(InputError):
        ChatTemplate(template, {}).render([])
