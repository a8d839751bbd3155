"""model.py against Hugging Face, and what must hold of any causal model."""
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers import GPT2, TINY
from model import LanguageModel, ModelConfig, float_weight, quantize_int8_
from train import TrainConfig, model_config

SIZES = dict(vocab_size=97, n_layer=3, n_head=4, n_embd=32, intermediate_size=56, block_size=40)


def randomized(model):
    """All parameters random, biases and norms too, so that none can be left out unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.mark.parametrize("n_kv_head,tied", [(0, False), (2, False), (1, True)])
def test_llama_equals_hugging_face(n_kv_head, tied):
    cfg = ModelConfig(arch="llama", n_kv_head=n_kv_head, tie_weights=tied, rope_theta=500.0, **SIZES)
    ours = randomized(LanguageModel(cfg))
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=n_kv_head or 4,
        hidden_size=32, intermediate_size=56, max_position_embeddings=40, rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters=dict(rope_type="default", rope_theta=500.0))).eval()
    theirs.load_state_dict(ours.state_dict())  # the same names: nothing is renamed
    x = torch.randint(97, (3, 40))
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-5, atol=1e-5)


def test_gpt2_equals_hugging_face():
    ours = randomized(LanguageModel(ModelConfig(**{**SIZES, **GPT2})))
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_layer=3, n_head=4, n_embd=32, n_inner=56,
                                        n_positions=40)).eval()
    weights = {"transformer.wte.weight": ours.model.embed_tokens.weight,
               "transformer.wpe.weight": ours.model.embed_positions.weight,
               "lm_head.weight": ours.lm_head.weight}

    def linear(name, *parts):  # Conv1D: transposed; attention: q, k, v side by side
        weights[name + ".weight"] = torch.cat([m.weight for m in parts]).T
        weights[name + ".bias"] = torch.cat([m.bias for m in parts])

    def norm(name, m):
        weights[name + ".weight"], weights[name + ".bias"] = m.weight, m.bias
    for i, layer in enumerate(ours.model.layers):
        h, a = f"transformer.h.{i}.", layer.self_attn
        norm(h + "ln_1", layer.input_layernorm)
        norm(h + "ln_2", layer.post_attention_layernorm)
        linear(h + "attn.c_attn", a.q_proj, a.k_proj, a.v_proj)
        linear(h + "attn.c_proj", a.o_proj)
        linear(h + "mlp.c_fc", layer.mlp.up_proj)
        linear(h + "mlp.c_proj", layer.mlp.down_proj)
    norm("transformer.ln_f", ours.model.norm)
    theirs.load_state_dict(weights)
    x = torch.randint(97, (3, 40))
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, GPT2])
def test_the_future_is_not_seen(kind):
    model = randomized(LanguageModel(ModelConfig(**{**SIZES, **kind})))
    x = torch.randint(97, (1, 20))
    changed = x.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 97
    torch.testing.assert_close(model(x)[:, :10], model(changed)[:, :10], rtol=0, atol=1e-6)
    assert not torch.allclose(model(x)[:, 10], model(changed)[:, 10])


@pytest.mark.parametrize("kind", [{}, GPT2])
def test_logits_are_the_head_of_the_final_hidden_states(kind):
    """What does not want all the logits at once takes these two: also where the head is a matrix alone."""
    model = randomized(LanguageModel(ModelConfig(**{**SIZES, **kind})))
    x = torch.randint(97, (2, 9))
    h = model.model(x)
    assert h.shape == (2, 9, 32)
    torch.testing.assert_close(model.lm_head(h), model(x))
    torch.testing.assert_close(h @ float_weight(model.lm_head, torch.float32).T, model(x))


@pytest.mark.parametrize("kind", [{}, GPT2])
def test_initialisation(kind):
    cfg = ModelConfig(**{**SIZES, "vocab_size": 4000, "n_embd": 128, "intermediate_size": 256, **kind})
    torch.manual_seed(0)
    model = LanguageModel(cfg)
    layer = model.model.layers[1]
    scaled = 0.02 / 6 ** 0.5 if kind else 0.02
    for m, std in ((model.model.embed_tokens, 0.02), (layer.self_attn.q_proj, 0.02),
                   (layer.mlp.up_proj, 0.02), (layer.self_attn.o_proj, scaled),
                   (layer.mlp.down_proj, scaled)):
        assert m.weight.std().item() == pytest.approx(std, rel=0.03)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(kind)


def test_int8_in_float16_holds_what_float16_holds():
    """A teacher's large activations on a card without bfloat16."""
    torch.manual_seed(1)
    linear = torch.nn.Linear(1024, 4, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    row = linear.weight[0].detach()
    x = (torch.randn(1024) + 6000 * row / row.norm()).half()
    exact = linear(x.float())
    quantize_int8_(wrapped := torch.nn.Sequential(linear))
    torch.testing.assert_close(wrapped(x).float(), exact, rtol=0.02, atol=2)
    assert 3000 < exact[0] < 65504


@pytest.mark.parametrize("kind", [{}, dict(n_kv_head=2), GPT2])
def test_int8_is_close_small_and_shares_a_tied_table(kind):
    sizes = {**SIZES, "vocab_size": 2000, "n_embd": 128, "intermediate_size": 256}
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(**{**sizes, **kind})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases too: a dropped one must show
            p.add_(torch.randn_like(p) * (0.5 if name.endswith("bias") else 0.02))
    x = torch.randint(2000, (4, 40))
    exact = model(x)
    size = sum(p.numel() * 4 for p in model.parameters())
    quantize_int8_(model)
    assert (model(x) - exact).abs().mean() < 0.03 * exact.std()
    tables = {v.data_ptr(): v.numel() * v.element_size() for v in model.state_dict().values()}  # shared: once
    assert sum(tables.values()) < 0.30 * size
    torch.testing.assert_close(model.model(x) @ float_weight(model.lm_head, torch.float32).T, model(x))
    assert not [n for n, p in model.named_parameters() if p.dim() > 1]
    if kind is GPT2:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_int8_weight_is_the_nearest_on_a_symmetric_scale():
    linear = torch.nn.Linear(7, 5)
    wrapped = torch.nn.Sequential(linear)
    weight = linear.weight.detach().double()
    quantize_int8_(wrapped)
    q = wrapped[0]
    assert q.weight.abs().amax(1).tolist() == [127] * 5
    scale = q.scale.double()[:, None]
    assert ((q.weight.double() * scale - weight).abs() <= scale * 0.5001).all()


def test_a_model_takes_its_settings_from_trainings():
    cfg = model_config(TrainConfig(**TINY, vocab_size=50))
    assert type(cfg) is ModelConfig and (cfg.n_embd, cfg.n_layer, cfg.vocab_size) == (32, 2, 50)


def test_a_model_of_no_known_vocabulary_is_refused():
    """0 is the data's: train.py puts the number in its place."""
    with pytest.raises(SystemExit, match="vocab_size=0 must be at least 1"):
        LanguageModel(ModelConfig())


@pytest.mark.thorough
@pytest.mark.usefixtures("compiler")
def test_compiled_gradients_of_wide_heads():
    """In bfloat16, with heads of 64: torch 2.13 with AVX-512 made no numbers of them."""
    cfg = ModelConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=128, intermediate_size=128, block_size=128)
    x, gradients = torch.randint(0, 64, (4, 128)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(cfg)
        if compiled:
            model.model.compile_layers()
        with torch.autocast("cpu", torch.bfloat16):
            model.model(x).pow(2).mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    plain, compiled = gradients
    assert (compiled - plain).norm() < 0.05 * plain.norm()


def test_attention_has_a_dropout_of_its_own():
    """With attn_dropout alone, only the attention's weights are dropped: the mean of many passes is the
    undropped layer's."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=20, n_layer=1, n_head=2, n_embd=16, intermediate_size=16,
                                      block_size=8, attn_dropout=0.4)).train()
    layer, h = model.model.layers[0].self_attn, torch.randn(1, 8, 16)
    rope = model.model.cos, model.model.sin
    with torch.no_grad():
        dropped = torch.stack([layer(h, rope) for _ in range(4000)])
        whole = layer.eval()(h, rope)
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - whole).abs().max() < 0.1 * whole.abs().max()
    assert model.model.drop.p == 0 and model.model.layers[0].drop.p == 0
