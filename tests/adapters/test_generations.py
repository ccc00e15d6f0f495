"""`generations`: a table whose tokens are the decoder's own, at each threshold and in full."""

import numpy as np
import toy_decoder

import riskcal
from riskcal.report import generations as report
from riskcal_adapters import generations

TEXTS = ["one", "two", "three"]
GRID = [0.2, 0.6]


def test_pieces_are_the_decoders_text_and_layers_those_that_it_left_at():
    decoder = toy_decoder.load()
    table = generations({"prompt": [7, 8, 9], "text": TEXTS}, decoder, GRID, max_new_tokens=9)
    assert table["threshold"].tolist() == [np.inf, 0.6, 0.2] * 3
    for row in table.itertuples():
        policy = riskcal.ExitPolicy(threshold=row.threshold)
        alone = decoder.generate(*decoder.encode([row.text]), policy=policy, max_new_tokens=9)
        assert "".join(row.tokens) == decoder.decode(alone.tokens)[0]
        assert row.exit_layers == alone.exit_layers[0][alone.exit_layers[0] > 0].tolist()
        assert row.threshold < np.inf or set(row.exit_layers) == {decoder.n_layers}
    assert any(len(set(layers)) > 1 for layers in table["exit_layers"])
    assert report.checked(table).equals(table)
