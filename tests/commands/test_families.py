from __future__ import annotations

import json

from optimum_rmtkd.surgery.overview import families_table, family_rows


def test_the_command_prints_the_same(cli):
    code, out, err = cli("families", "bert", "gpt2")
    assert code == 0, err
    assert out.strip() == families_table(family_rows(("bert", "gpt2"))).strip()
    code, out, _ = cli("families", "gpt2", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["family"] == "GPT-2" and "attention_groups" in row["sites"]
    code, _, err = cli("families", "brt")
    assert code == 2 and "brt" in err and "bert" in err
