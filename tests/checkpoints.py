"""Tiny fine-tuned checkpoints of many architectures: random weights, tokenizers trained on a few sentences, no hub."""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LABELS = ("balance", "transfer", "card lost", "opening hours", "greeting")
SENTENCES = (
    "what is the balance of my account",
    "how much money do I have",
    "send twenty euros to my landlord",
    "please transfer the rent today",
    "I lost my card yesterday",
    "my card was stolen, block it",
    "when do you open on saturdays",
    "opening hours of the branch in town",
    "hello there",
    "good morning to you, how are you doing today",
)
TRAIN = [(text, LABELS[i // 2]) for i, text in enumerate(SENTENCES)]
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
_DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
_DEBERTA |= {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 3}
_MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2}
_MODERN |= {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
_XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80, "bos_token_id": 2, "eos_token_id": 2}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 80}

# Architecture: class prefix, settings, tokenizer, and the name of its last linear layer, which the export must find.
ARCHITECTURES = {
    "bert": ("Bert", _SMALL, "bert", "classifier"),
    "roberta": ("Roberta", {**_SMALL, "pad_token_id": 1}, "roberta", "classifier.out_proj"),
    "xlm-roberta": ("XLMRoberta", {**_SMALL, "pad_token_id": 1}, "roberta", "classifier.out_proj"),
    "distilbert": ("DistilBert", _DISTIL, "distilbert", "classifier"),
    "albert": ("Albert", {**_SMALL, "embedding_size": 16}, "bert", "classifier"),
    "electra": ("Electra", {**_SMALL, "embedding_size": 16}, "bert", "classifier.out_proj"),
    "deberta-v2": ("DebertaV2", {**_SMALL, **_DEBERTA}, "bert", "classifier"),
    "xlnet": ("XLNet", _XLNET, "xlnet", "logits_proj"),
    "mpnet": ("MPNet", {**_SMALL, "pad_token_id": 1}, "roberta", "classifier.out_proj"),
    "modernbert": ("ModernBert", {**_SMALL, **_MODERN}, "distilbert", "classifier"),
    "gpt2": ("GPT2", _GPT2, "gpt2", "score"),
    "llama": ("Llama", _DECODER, "llama", "score"),
    "qwen2": ("Qwen2", {**_DECODER, "pad_token_id": 1}, "qwen2", "score"),
    "eurobert": ("EuroBert", {**_DECODER, "pad_token_id": 1}, "roberta", "classifier"),
    "qwen3": ("Qwen3", {**_DECODER, "pad_token_id": 1, "head_dim": 8}, "qwen2", "score"),
}


def make_tokenizer(kind: str = "bert"):
    """A fast tokenizer of the given kind; each call returns a new copy."""
    return copy.deepcopy(_trained(kind))


@functools.cache  # training breaks ties at random, and a model must get the same tokenizer again
def _trained(kind: str):
    if kind in ("bert", "distilbert", "xlnet"):
        return _word_pieces(kind)
    specials = {"gpt2": ["!", '"', "<|endoftext|>"]}.get(kind, ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=sorted(alphabet))
    )
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        options |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    elif kind == "qwen2":
        options |= {"pad_token": "<pad>"}
    elif kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        options |= {"padding_side": "left"}
    else:
        options = dict.fromkeys(options, "<|endoftext|>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], model_max_length=78, **options
    )


def _word_pieces(kind: str):
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*names.values()])
    )
    options: dict[str, object] = {f"{role}_token": token for role, token in names.items()}
    template = "[CLS] $A [SEP]"
    if kind == "xlnet":
        template = "$A:0 [SEP]:0 [CLS]:2"
        options |= {"padding_side": "left"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=78,
        model_input_names=inputs if kind != "distilbert" else [inputs[0], inputs[2]],
        **options,
    )
    if kind == "xlnet":
        made._pad_token_type_id = 3  # as XLNetTokenizer does
    return made


def make_model(architecture: str, tokenizer, seed: int = 0, labels=LABELS, **settings):
    """A classifier with random weights, large enough that its answers differ from text to text."""
    prefix, options, _, _ = ARCHITECTURES[architecture]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = getattr(transformers, f"{prefix}Config")(vocab_size=len(tokenizer), **{**options, **names, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
    return model


def save_checkpoint(folder, architecture: str = "bert", **settings):
    """A checkpoint as `save_pretrained` leaves it; returns its folder."""
    tokenizer = make_tokenizer(ARCHITECTURES[architecture][2])
    make_model(architecture, tokenizer, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
