"""Makes the small oracles beside this file: odd shapes, and what checkpoints have that the golden ones do not.

    python tests/oracles/make.py [NAME ...]

needs torch and transformers 5.24; the cases that say `v4` need 4.57.6 and are made by a second run with that version.
Each case is drawn from its own seeds until its greedy tokens and its routes are stable, so a second run gives the same
files. Everything is computed in float32, eager, on one thread, on the weights as stored.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
V4 = transformers.__version__.startswith("4.")
GREEDY = 8
MARGIN = 5e-3

SMALL = dict(vocab_size=96, hidden_size=42, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
             head_dim=20, intermediate_size=44, max_position_embeddings=1024, tie_word_embeddings=False,
             bos_token_id=0, eos_token_id=1, pad_token_id=0)
QWEN3 = dict(SMALL, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True)
MIXTRAL = dict(SMALL, num_local_experts=5, num_experts_per_tok=2, intermediate_size=20)
LATENT = dict(vocab_size=96, hidden_size=42, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
              intermediate_size=44, max_position_embeddings=2560, tie_word_embeddings=False, q_lora_rank=24,
              kv_lora_rank=20, qk_nope_head_dim=18, qk_rope_head_dim=12, v_head_dim=22, n_shared_experts=1,
              n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, first_k_dense_replace=1,
              bos_token_id=0, eos_token_id=1, pad_token_id=0)
PHI = dict(vocab_size=96, hidden_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
           intermediate_size=20, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=512,
           attention_bias=True, lm_head_bias=True, router_jitter_noise=0.1, tie_word_embeddings=False, bos_token_id=0,
           eos_token_id=1, pad_token_id=0)
GPT_OSS = dict(SMALL, num_local_experts=5, num_experts_per_tok=2, intermediate_size=20)


def each(count, first, step):
    return [round(first + step * i, 3) for i in range(count)]


LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=64,
                short_factor=each(10, 1.0, 0.05), long_factor=each(10, 1.5, 1.1), short_mscale=1.25, long_mscale=1.4)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=64, beta_fast=32,
            beta_slow=1)

# name: family, configuration, lengths of prompts; fused, quantised, mtp: how it is stored; context: what it is opened for.
CASES = {
    "linear": dict(family="qwen3_moe", prompts=[5, 300], config=dict(
        QWEN3, num_hidden_layers=3, mlp_only_layers=[0],
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    "dynamic_within": dict(family="mixtral", prompts=[5, 300], config=dict(
        MIXTRAL, sliding_window=16, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0))),
    "dynamic_beyond": dict(family="qwen3_moe", prompts=[200], greedy=1, context=200, config=dict(
        QWEN3, max_position_embeddings=64,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0))),
    "llama3": dict(family="llama", prompts=[5, 300], config=dict(
        SMALL, num_hidden_layers=1, rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=128))),
    "yarn": dict(family="qwen3_moe", prompts=[5, 300], fused=True, config=dict(
        QWEN3, decoder_sparse_step=2, num_hidden_layers=3, rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128))),
    "yarn_deepseek_v2": dict(family="deepseek_v2", prompts=[5, 300], config=dict(
        LATENT, topk_method="group_limited_greedy", n_group=3, topk_group=2, routed_scaling_factor=1.5,
        rope_parameters=dict(YARN, mscale=0.707, mscale_all_dim=0.5))),
    "yarn_deepseek_v3": dict(family="deepseek_v3", prompts=[5, 300], fused=True, mtp=True, config=dict(
        LATENT, n_group=3, topk_group=2, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0))),
    "longrope_short": dict(family="phimoe", prompts=[5, 50], config=dict(PHI, rope_parameters=LONGROPE)),
    "longrope_long": dict(family="phimoe", prompts=[100, 300], v4=True, context=512, config=dict(
        PHI, original_max_position_embeddings=64, rope_theta=10000.0,
        rope_scaling={("type" if k == "rope_type" else k): v for k, v in LONGROPE.items() if k != "rope_theta"})),
    "longrope_llama": dict(family="llama", prompts=[100, 300], context=512, config=dict(
        SMALL, max_position_embeddings=512, rope_parameters={k: v for k, v in LONGROPE.items() if "mscale" not in k})),
    "window_mixtral": dict(family="mixtral", prompts=[5, 300], fused=True, config=dict(
        MIXTRAL, num_hidden_layers=1, sliding_window=100, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "window_qwen2": dict(family="qwen2_moe", prompts=[5, 300], config=dict(
        QWEN3, num_hidden_layers=4, shared_expert_intermediate_size=12, decoder_sparse_step=2,
        use_sliding_window=True, sliding_window=70, max_window_layers=3, qkv_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "window_qwen3": dict(family="qwen3_moe", prompts=[5, 300], config=dict(
        QWEN3, use_sliding_window=True, sliding_window=33, max_window_layers=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "window_gpt_oss": dict(family="gpt_oss", prompts=[5, 330], config=dict(GPT_OSS, sliding_window=130)),
    "mxfp4": dict(family="gpt_oss", prompts=[5, 40], quantised="mxfp4", config=dict(
        GPT_OSS, hidden_size=64, intermediate_size=32, num_hidden_layers=1, sliding_window=8)),
    "fp8": dict(family="deepseek_v3", prompts=[5, 40], quantised="fp8", mtp=True, config=dict(
        LATENT, hidden_size=136, intermediate_size=136, q_lora_rank=20, num_experts_per_tok=2, n_routed_experts=4, moe_intermediate_size=12, n_group=2, topk_group=1,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "olmoe": dict(family="olmoe", prompts=[5, 40], config=dict(
        {k: v for k, v in QWEN3.items() if k != "head_dim"}, hidden_size=40, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=1, clip_qkv=0.6, intermediate_size=20,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "granitemoe": dict(family="granitemoe", prompts=[5, 300], config=dict(
        {k: v for k, v in MIXTRAL.items() if k != "head_dim"}, hidden_size=40, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=7, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.2,
        logits_scaling=0.8, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "glm4_moe": dict(family="glm4_moe", prompts=[5, 300], mtp=True, config=dict(
        SMALL, num_hidden_layers=3, n_routed_experts=7, num_experts_per_tok=3, moe_intermediate_size=20,
        n_shared_experts=2, use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.7,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.6))),
}


def fill(model, generator):
    """Random weights, rounded to bfloat16; nothing is 0 or 1, so that leaving it out shows."""
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if "inv_freq" in name:
            continue
        normal = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith("bias") or "sinks" in name or tensor.dim() == 1:
            value = 0.3 * normal
        else:
            value = 0.25 * normal
        with torch.no_grad():
            tensor.copy_(value.to(torch.bfloat16).float())


def quantise_mxfp4(model, generator):
    """Blocks and scales for the experts of gpt_oss, which are set to what transformers decodes them to."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    stored = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = parameter.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator).to(torch.uint8)
        with torch.no_grad():
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float())
        stored[name] = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored


def quantise_fp8(tensors):
    """E4M3 with a scale for each square of 128; returns what is stored, and what it means."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        matrix = name.startswith("model.layers.") and tensor.dim() == 2 and not name.endswith("mlp.gate.weight")
        if not matrix:
            stored[name] = meant[name] = tensor
            continue
        rows, columns = tensor.shape
        squares = (-(-rows // 128), -(-columns // 128))
        padded = torch.zeros(squares[0] * 128, squares[1] * 128)
        padded[:rows, :columns] = tensor.float()
        scales = padded.reshape(squares[0], 128, squares[1], 128).abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        bytes_ = (tensor.float() / spread).to(torch.float8_e4m3fn)
        stored[name] = bytes_
        stored[f"{name}_scale_inv"] = scales
        meant[name] = bytes_.float() * spread
    return stored, meant


def with_mtp(tensors, layers):
    """A layer that predicts further tokens, after the last one."""
    tensors = dict(tensors)
    like = f"model.layers.{layers - 1}."
    for name in [name for name in tensors if name.startswith(like)]:
        if ".experts." not in name:
            tensors[f"model.layers.{layers}.{name[len(like):]}"] = tensors[name].clone()
    hidden = tensors["model.norm.weight"].shape[0]
    for name, shape in [("enorm.weight", [hidden]), ("hnorm.weight", [hidden]), ("eh_proj.weight", [hidden, 2 * hidden]),
                        ("shared_head.norm.weight", [hidden])]:
        tensors[f"model.layers.{layers}.{name}"] = torch.ones(shape, dtype=torch.bfloat16)
    return tensors


class Routes:
    """What the routers of a model give: by layer the sorted experts and their weights."""

    def __init__(self, model):
        self.of_layer = {}
        for name, module in model.named_modules():
            if name.endswith(".experts") and not V4:
                layer = name.split(".layers.")[1].split(".")[0]
                module.register_forward_pre_hook(lambda _, args, layer=layer: self.take(layer, args))

    def take(self, layer, args):
        ids, weights = args[1].reshape(-1, args[1].shape[-1]), args[2]
        weights = weights.reshape(ids.shape[0], -1)
        if weights.shape != ids.shape:
            weights = weights.gather(1, ids)
        order = ids.argsort(-1)
        self.of_layer[layer] = (ids.gather(1, order), weights.gather(1, order).float())


def forward(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def greedy(model, prompt, count):
    """Tokens, each from the whole sequence without a cache; `None` where a choice is close."""
    tokens = list(prompt)
    for _ in range(count):
        top = forward(model, tokens)[-1].topk(2)
        if top.values[0] - top.values[1] < MARGIN or top.indices[0] < 3:
            return None
        tokens.append(int(top.indices[0]))
    return tokens[len(prompt):]


def stable(model, routes, tokens, generator):
    """Whether small errors change no route: the embedding is disturbed a little."""
    forward(model, tokens)
    first = {layer: ids.clone() for layer, (ids, _) in routes.of_layer.items()}
    embedding = model.get_input_embeddings().weight
    kept = embedding.detach().clone()
    same = True
    for _ in range(6):
        with torch.no_grad():
            embedding.copy_(kept * (1 + 2e-5 * torch.randn(kept.shape, generator=generator)))
        forward(model, tokens)
        same = same and all(torch.equal(ids, first[layer]) for layer, (ids, _) in routes.of_layer.items())
    with torch.no_grad():
        embedding.copy_(kept)
    return same


def older(config):
    """The same configuration in the spelling of transformers 4 and of the hub."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", None) or {})
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if config["model_type"] == "phimoe" and "original_max_position_embeddings" in rope:
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else dict(rope, type=kind)
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


def write(name, case, model, config, generator):
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    blocks = quantise_mxfp4(model, generator) if case.get("quantised") == "mxfp4" else {}
    with tempfile.TemporaryDirectory() as folder:
        keywords = {} if V4 else dict(save_original_format=not case.get("fused", False))
        # A copy: the rotary frequencies must not be rounded with the weights.
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, **keywords)
        tensors = load_file(f"{folder}/model.safetensors")
        written = json.loads(Path(f"{folder}/config.json").read_text())
    meant = None
    if case.get("quantised") == "fp8":
        tensors, meant = quantise_fp8(tensors)
        written["quantization_config"] = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128],
                                              activation_scheme="dynamic")
    for published, parts in blocks.items():
        del tensors[published]
        tensors.update(parts)
        written["quantization_config"] = dict(quant_method="mxfp4")
    if case.get("mtp"):
        tensors = with_mtp(tensors, written["num_hidden_layers"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    (out / "config_v4.json").write_text(json.dumps(written if V4 else older(written), indent=1, sort_keys=True) + "\n")
    if meant is not None:
        with tempfile.TemporaryDirectory() as folder:
            save_file(meant, f"{folder}/model.safetensors", metadata={"format": "pt"})
            del written["quantization_config"]
            Path(f"{folder}/config.json").write_text(json.dumps(written))
            model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            model.eval()
    return model


def draw(name, case, seed):
    generator = torch.Generator().manual_seed(seed)
    config = transformers.AutoConfig.for_model(case["family"], **case["config"])
    config._attn_implementation = "eager"
    if not V4:
        config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    fill(model, generator)
    model = write(name, case, model, config, generator)
    if not V4:
        model.config._experts_implementation = "eager"
    routes = Routes(model)
    choice = random.Random(seed)
    oracle = dict(case={k: v for k, v in case.items() if k != "config"}, seed=seed,
                  versions=dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0]),
                  prompts=[], greedy=[], positions=[], router=[])
    tensors = {}
    for p, length in enumerate(case["prompts"]):
        prompt = [choice.randrange(3, 96) for _ in range(length)]
        tokens = greedy(model, prompt, case.get("greedy", GREEDY))
        if tokens is None or not stable(model, routes, prompt + tokens[:-1], generator):
            return False
        logits = forward(model, prompt + tokens[:-1])
        positions = sorted(set(range(0, length, 23)) | set(range(max(0, length - 3), length + len(tokens) - 1)))
        oracle["prompts"].append(prompt)
        oracle["greedy"].append(tokens)
        oracle["positions"].append(positions)
        oracle["router"].append({layer: dict(ids=ids[positions].tolist(), weights=weights[positions].tolist())
                                 for layer, (ids, weights) in sorted(routes.of_layer.items())})
        tensors[f"prompt{p}.logits"] = logits[positions].contiguous()
    save_file(tensors, HERE / name / "oracle.safetensors")
    (HERE / name / "oracle.json").write_text(json.dumps(oracle, separators=(",", ":")) + "\n")
    return True


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        if case.get("v4", False) != V4:
            continue
        seed = next(seed for seed in range(1000) if draw(name, case, seed))
        size = sum(path.stat().st_size for path in (HERE / name).iterdir())
        print(f"{name}: seed {seed}, {size // 1024} KiB", flush=True)


main()
