"""Models as they are: the same logits as eager attention, in every way that tokens come."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import CACHE, EVERY, build, left_padded, tokens

import sinkattn.hf as hf


def logits_of(model, *arguments, **keywords):
    with torch.no_grad():
        return model(*arguments, **keywords).logits


def assert_same(got, expected, bound=5e-6):
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("family", EVERY)
def test_logits_are_those_of_eager(family):
    """A window off by one, a dropped sink or softcap, another scale: each moves logits by percents."""
    model = build(family)
    ids, padding = left_padded(3, 24)
    padding[2, 20:] = 0  # to the right as well
    ids = ids * padding
    expected = [logits_of(model, ids), logits_of(model, ids, attention_mask=padding)]
    hf.enable(model)
    assert_same(logits_of(model, ids), expected[0])
    real = padding.bool()
    assert_same(logits_of(model, ids, attention_mask=padding)[real], expected[1][real])


def test_a_name_at_construction():
    hf.register()
    ids = tokens(1, 9)
    assert_same(logits_of(build("llama", "sinkattn"), ids), logits_of(build("llama"), ids))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_half_precision_is_no_worse_than_eager(family):
    model = build(family)
    ids = tokens(2, 40)
    exact = logits_of(model, ids)
    eager = logits_of(model.bfloat16(), ids).float()
    hf.enable(model)
    for cache in (None, hf.SinkCache(model.config, window=60)):
        ours = logits_of(model, ids, **{CACHE: cache}).float()
        assert (ours - exact).norm() <= 1.5 * (eager - exact).norm()


def test_autocast():
    model = build("llama")
    ids = tokens(1, 20)
    exact = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        eager = logits_of(model, ids).float()
        ours = logits_of(hf.enable(model), ids).float()
    assert (ours - exact).norm() <= 1.5 * (eager - exact).norm()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_by_position_ids(family, batch):
    """Sequences that begin anew within a row do not see each other."""
    model = build(family)
    ids = tokens(batch, 24)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None].expand(batch, -1)
    expected = torch.cat([logits_of(model, ids[:, :9]), logits_of(model, ids[:, 9:])], 1)
    hf.enable(model)
    assert_same(logits_of(model, ids, position_ids=positions, use_cache=False), expected)


def test_packed_by_boundaries():
    model = build("llama")
    ids = tokens(1, 24)
    expected = torch.cat([logits_of(model, ids[:, :9]), logits_of(model, ids[:, 9:])], 1)
    hf.enable(model)
    boundaries = torch.tensor([0, 9, 24], dtype=torch.int32)
    got = logits_of(model, ids, position_ids=torch.cat([torch.arange(9), torch.arange(15)])[None],
                    cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=15,
                    max_length_k=15, use_cache=False)
    assert_same(got, expected)


@pytest.mark.parametrize("sizes", [{}, {"window": 3}])
def test_an_encoder(sizes):
    """Not causal, with padding; a window to both sides is one more than transformers' number."""
    from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel
    from transformers.models.bert import modeling_bert
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
             "intermediate_size": 32, "vocab_size": 50}
    assert modeling_bert
    torch.manual_seed(1)
    if sizes:
        config = ModernBertConfig(**small, local_attention=6, pad_token_id=0, bos_token_id=1,
                                  eos_token_id=2, cls_token_id=1, sep_token_id=2)
        model = ModernBertModel._from_config(config, attn_implementation="eager").eval()
    else:
        model = BertModel._from_config(BertConfig(**small), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    ids, padding = left_padded(2, 20)
    with torch.no_grad():
        expected = model(ids, attention_mask=padding).last_hidden_state
        got = hf.enable(model)(ids, attention_mask=padding).last_hidden_state
    assert_same(got[padding.bool()], expected[padding.bool()], 2e-5)


def test_attention_without_a_mask():
    """An encoder that asks for none, and attention to another sequence."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    config = WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                           vocab_size=50, num_mel_bins=8, max_source_positions=12, pad_token_id=0,
                           bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                           suppress_tokens=[], begin_suppress_tokens=[])
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    features = torch.randn(2, 8, 24)
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(features, decoder_input_ids=ids).logits
        got = hf.enable(model)(features, decoder_input_ids=ids).logits
    assert_same(got, expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_in_one_graph():
    """With attention_mask given: without it transformers takes any compiled text for a packed one."""
    model, ids = build("gemma2"), tokens(2, 16)
    expected = logits_of(model, ids)
    hf.enable(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(logits_of(compiled, ids, attention_mask=torch.ones_like(ids), use_cache=False), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("padded", [False, True])
def test_an_offset_that_only_the_device_knows(padded):
    """Under a static cache on a GPU: nothing is read, the lengths say what is written."""
    from sinkattn import attend
    from sinkattn.hf.masks import Mask, Pattern
    columns = torch.zeros(2, 20, dtype=torch.bool)
    columns[:, :9] = True
    columns[1, :4] = not padded
    q, (k, v) = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 2, 20, 8)
    known = Mask(Pattern(causal=True, window=5), 2, 3, 20, 6, columns if padded else None)
    unknown = Mask(Pattern(causal=True, window=5), 2, 3, 20, torch.tensor(6), columns if padded else None)
    assert known.key_count == 9 and unknown.key_count is None
    assert_same(attend(q, k, v, **unknown.keywords), attend(q, k[:, :, :9], v[:, :, :9], **known.keywords))
