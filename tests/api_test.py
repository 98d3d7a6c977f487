"""The Python API: the same core as the commands, from a folder's name."""

import jax
import numpy as np
import pytest

import ctxjax
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.models import params as params_lib, transformer
from ctxjax.models.hf import save as hf_save
from ctxjax.models.transformer import ModelConfig
from ctxjax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("two_devices")
CONTEXT = "f>b;a>e;c>d;b>a;e>f;d>c;"
QUESTIONS = ["#2:fac", "#1:abcde", "#3:fed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, two_devices):
    tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    config = ModelConfig(len(tokenizer), width=32, layers=2, query_heads=4, kv_heads=2, head_dim=8, mlp_width=48)
    params = params_lib.init(transformer.param_specs(config), jax.random.key(0), make_mesh(fsdp=2))
    folder = tmp_path_factory.mktemp("api") / "model"
    hf_save.save(folder, params, config, tokenizer, (tokenizer.eos_token_id,), model_type="llama")
    return ctxjax.load_model(folder)


def greedy(model, question: str, context: str | None, tokens: int) -> str:
    """A response by the definition: the logits' argmax, one whole pass for every token."""
    chat = [{"role": "system", "content": context}] if context is not None else []
    chat.append({"role": "user", "content": question})
    ids = list(model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    start = len(ids)
    for _ in range(tokens):
        row = np.zeros((2, 48), np.int32)  # of one length, so that one program serves; two devices want two rows
        row[:, -len(ids) :] = ids
        mask = np.broadcast_to(np.arange(48) >= 48 - len(ids), row.shape)
        ids.append(int(ctxjax.logits(model.params, model.config, row, mask)[0, -1].argmax()))
        if ids[-1] in model.stop_ids:
            break
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_generation_is_the_argmax_of_the_logits(model, context):
    answers = ctxjax.generate(model, QUESTIONS, context, max_tokens=4)
    assert answers == [greedy(model, question, context, 4) for question in QUESTIONS]


@pytest.mark.slow
def test_samples_depend_on_the_seed_and_the_row_not_on_the_batch(model):
    def sample(**settings):
        return ctxjax.generate(model, QUESTIONS * 6, CONTEXT, max_tokens=8, temperature=1.0, **settings)

    assert sample(batch_size=8) == sample(batch_size=64)
    assert sample(seed=1) != sample(seed=0)


def test_other_parameters_answer_through_the_same_folder(model):
    zeros = jax.tree.map(lambda w: 0 * w, model.params)
    assert ctxjax.generate(model, QUESTIONS, params=zeros, max_tokens=4) != ctxjax.generate(
        model, QUESTIONS, max_tokens=4
    )


def test_a_response_beyond_the_models_positions_is_refused(model):
    message = r"max_tokens = 2040 are together more than the model's 2048 positions .*; lower max_tokens"
    with pytest.raises(ValueError, match=message):
        ctxjax.generate(model, QUESTIONS, CONTEXT, max_tokens=2040)


def test_no_questions_no_answers(model):
    assert ctxjax.generate(model, []) == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="it exports generate, load_model, logits"):
        ctxjax.train  # noqa: B018
