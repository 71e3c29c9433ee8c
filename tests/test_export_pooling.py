from __future__ import annotations

import checkpoints
import pytest
import torch
import transformers

from export.pooling import last_states, pooled


@pytest.mark.parametrize("layers, taken", [(5, 3), (2, 2), (1, 1)])
def test_the_last_layers_are_averaged_and_the_embedding_never(tmp_path, layers, taken):
    folder = checkpoints.save_checkpoint(tmp_path / "checkpoint", "bert", num_hidden_layers=layers)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with torch.no_grad(), last_states(model) as states:
        model(**tokens)
    with torch.no_grad():
        every = model.base_model(**tokens, output_hidden_states=True).hidden_states
    assert len(states[-1]) == taken
    for ours, theirs in zip(states[-1], every[-taken:], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not model.config.output_hidden_states


def test_layers_of_any_scale_count_alike_and_padding_not():
    state = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    mean = pooled([state, 1000 * state], mask)
    length = state.pow(2).mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(mean[0], (state / length)[0, :3].mean(dim=0), rtol=1e-3, atol=1e-4)
    assert (mean[1] == 0).all()
