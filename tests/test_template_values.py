"""What a chat template is told, and the day that it writes, from training to resuming to scores."""

import datetime
import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from rich.console import Console
from test_templates import bytewise, rows_of
from test_train import argv, write
from transformers import AutoTokenizer

from switchkd import templates
from switchkd.arguments import ScriptArguments
from switchkd.checkpoint import day_of, read_run_state, settings_of
from switchkd.config import SwitchConfig
from switchkd.evaluate import begin, load_checkpoints, read_set
from switchkd.evaluate_options import EvalArguments, Source
from switchkd.loading import load_tokenizers
from switchkd.templates import Template, same_template, with_kwargs
from switchkd.train import main
from switchkd.trainer import SwitchTrainer

MESSAGES = [{"role": "user", "content": "Why?"}]
# Begins as many do: with a line break and with a block that is set in.
THINKS = """
  {% if think is defined and not think %}[brief]{% endif %}
{%- macro sign() %}{{ name }}{{ more.list }}{% endmacro %}
{{ sign() }}{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<end>{% endfor %}"""
DATED = "{% set day = strftime_now('%d %b %Y') %}{% for m in messages %}{{ day }}{{ m.content }}"
DATED += "<end>{% endfor %}{% if brief is defined %}[{{ brief }}]{% endif %}"


def test_a_template_knows_what_it_was_told_unless_it_is_told_otherwise(tmp_path):
    tokenizer = bytewise(THINKS)
    values = {"think": False, "name": 'a"\\ %}\n{{ \U0001f600', "more": {"list": [1, None, True]}}
    told = with_kwargs(tokenizer, values)
    assert tokenizer.chat_template == THINKS
    told.save_pretrained(tmp_path)
    for known in (told, AutoTokenizer.from_pretrained(tmp_path), with_kwargs(told, values)):
        for given in ({}, {"think": True}, {"name": "b", "more": {}}):
            want = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **values | given)
            assert known.apply_chat_template(MESSAGES, tokenize=False, **given) == want
    other = with_kwargs(told, {"think": True})  # a student of a student
    want = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **values | {"think": True})
    assert other.apply_chat_template(MESSAGES, tokenize=False) == want
    assert same_template(tokenizer, other) and same_template(told, other)
    assert not same_template(bytewise("{{ messages }}"), other)
    assert same_template(byte_tokenizer(), byte_tokenizer())
    assert not same_template(byte_tokenizer(), other)


def test_values_that_no_template_takes_are_refused():
    expected = "got thinks, expected a name that the chat template takes"
    with pytest.raises(ValueError, match=expected):
        with_kwargs(bytewise(THINKS), {"thinks": False})
    with pytest.raises(ValueError, match="got messages, expected a name"):
        with_kwargs(bytewise(THINKS), {"messages": []})
    with pytest.raises(ValueError, match="but the tokenizer has no chat template"):
        with_kwargs(byte_tokenizer(), {"think": False})
    for wrong in ("[1]", "think", '{"think": '):
        with pytest.raises(ValueError, match="chat_template_kwargs: got .* expected a mapping"):
            SwitchConfig("x", use_cpu=True, chat_template_kwargs=wrong)
        with pytest.raises(ValueError, match="chat_template_kwargs: got .* expected a mapping"):
            EvalArguments(chat_template_kwargs=wrong)
    config = SwitchConfig("x", use_cpu=True, chat_template_kwargs='{"think": false}')
    assert config.chat_template_kwargs == {"think": False}
    teacher = {"teacher_model_name_or_path": "embedded"}
    with pytest.raises(ValueError, match="expected none with template alpaca"):
        load_tokenizers(ScriptArguments(template="alpaca", **teacher), config)
    row = {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match="line 1: chat_template_kwargs: got .*, expected none"):
        rows_of(bytewise(THINKS), row | {"chat_template_kwargs": {"think": False}})


def today(monkeypatch, *given):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(*given)

    monkeypatch.setattr(templates, "date", Day)
    monkeypatch.setattr("switchkd.evaluate.date", Day)


ROWS = [{"prompt": f"say {i} ", "completion": "ab" * (1 + i % 5)} for i in range(8)]


def make(folder, **options):
    teacher, model = (tiny_model(vocab_size=260, seed=i, dtype=torch.float32) for i in (1, 2))
    args = SwitchConfig(
        str(folder), use_cpu=True, eval_strategy="no", save_steps=1, max_steps=2, lmbda=1,
        max_prompt_length=40, max_new_tokens=12, disable_tqdm=True, log_completions=False,
        chat_template_kwargs={"brief": "so"}, **options,
    )  # fmt: skip
    return SwitchTrainer(model, teacher, args, ROWS, processing_class=bytewise(DATED))


def test_a_run_is_resumed_and_scored_with_the_prompts_that_it_began_with(tmp_path, monkeypatch):
    today(monkeypatch, 2024, 2, 29)
    first = make(tmp_path)
    prompt = first.processing_class.decode(first.train_dataset.rows[0].prompt_ids)
    assert prompt == "29 Feb 2024say 0 <end>[so]"
    first.train()
    first.save_model(str(tmp_path))
    assert day_of(str(tmp_path / "checkpoint-1")) == "2024-02-29"

    today(monkeypatch, 2024, 3, 1)
    again = make(tmp_path)
    assert again.train_dataset.digest == first.train_dataset.digest
    again.load_run_state(str(tmp_path / "checkpoint-1"))
    assert make(tmp_path / "new").train_dataset.digest != first.train_dataset.digest
    state = read_run_state(tmp_path / "checkpoint-1")
    assert state["day"] == "2024-02-29"

    args = EvalArguments(model_name_or_path=[str(tmp_path)], json=str(tmp_path / "scores.json"))
    models = load_checkpoints(args)
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\n')

    def scored(day):
        ((row,),) = read_set(Source((str(source),)), models, args, Console(quiet=True), day)
        return models[0].tokenizer.decode(row.prompt_ids)

    assert scored(begin(args)["day"]) == "01 Mar 2024a<end>[so]"
    (tmp_path / "scores.json").write_text(
        '{"settings": {"seeds": [10, 20, 30, 40, 50], "temperature": 1.0, "limit": null, '
        '"max_new_tokens": 256, "max_prompt_length": 256, "template": "auto"}, '
        '"day": "2023-12-31", "sets": {}, "models": {}}'
    )
    assert scored(begin(args)["day"]) == "31 Dec 2023a<end>[so]"
    (tmp_path / "config.yaml").write_text("model_name_or_path: x\ntemplate: none\n")
    models = load_checkpoints(args)
    assert scored("2024-03-01") == "a"
    (tmp_path / "my-model").mkdir()  # beside a run, and not of it
    found = [settings_of(str(tmp_path / name)) for name in ("checkpoint-1", "my-model")]
    assert found == [{"model_name_or_path": "x", "template": "none"}, {}]
    args.chat_template_kwargs, args.template = {"brief": "long"}, "chat"
    models = load_checkpoints(args)
    assert scored("2024-03-01") == "01 Mar 2024a<end>[long]"


def test_a_date_in_any_quotes_is_the_given_one():
    dated = bytewise(
        """{{ strftime_now( "%Y" ) }} {{strftime_now('%B')}} {{ messages[0].content }}"""
    )
    assert Template(dated, "chat", "2024-02-29")._rendered(MESSAGES) == "2024 February Why?"


def test_the_command_resumes_on_another_day(tmp_path, monkeypatch):
    trainer = make(tmp_path / "of")
    for name, model in (("teacher", trainer.teacher), ("student", trainer.model)):
        model.save_pretrained(tmp_path / name)
        bytewise(DATED).save_pretrained(tmp_path / name)
    write(tmp_path / "rows.jsonl", ROWS)
    flags = argv(tmp_path, "run", save_steps=1, max_steps=2, chat_template_kwargs='{"brief": "so"}')
    flags[flags.index("--max_prompt_length") + 1] = "40"
    today(monkeypatch, 2024, 2, 29)
    assert main(flags) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    today(monkeypatch, 2024, 3, 1)
    assert main([*flags, "--resume_from_checkpoint", "last"]) == 0
    with (tmp_path / "run" / "completions.jsonl").open() as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    assert len(prompts) > 2 and all(p.startswith("29 Feb 2024say ") for p in prompts)
    assert all(p.endswith("[so]") for p in prompts)
