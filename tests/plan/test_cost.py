"""Cost: the sample's notebook, prices that are stated, dated or not known."""

import json
from pathlib import Path

import pytest

from tsumugu.errors import UserError
from tsumugu.plan import cost
from tsumugu.plan.cost import Price


@pytest.mark.parametrize(("instances", "days"), [(4, 15.44), (16, 3.86)])
def test_the_samples_notebook(instances: int, days: float):
    """200 billion tokens of 3.6B at its 73.2 samples of 2,048 tokens a second on four instances, by hand."""
    [price] = [cost.price_of("ml.p4d.24xlarge", cost.read_prices(None), spot=False)]
    assert price == Price(32.7726, "USD", "2023", "the estimate of the sample that tsumugu succeeds")
    tokens_per_second = 73.2 * 2048 * instances / 4
    taken = 200e9 / tokens_per_second / 86400
    assert taken == pytest.approx(days, abs=0.01)
    # four times the instances in a quarter of the time: the same instance hours, 1,482.3
    found = cost.cost(price, instances, taken)
    assert found.amount == pytest.approx(32.7726 * 4 * 200e9 / (73.2 * 2048) / 3600)
    assert found.amount == pytest.approx(48_580, abs=1)
    assert found.to_json() == {
        "currency": "USD", "amount": found.amount, "price_per_hour": 32.7726, "price_date": "2023",
    }  # fmt: skip


def test_yen():
    price = Price(10.0, "USD", "2026-11-01", "a file").in_yen(150)
    assert (price.per_hour, price.currency, price.date) == (1500.0, "JPY", "2026-11-01")


def test_what_is_not_known_is_not_guessed():
    prices = cost.read_prices(None)
    assert cost.price_of("ml.p5.48xlarge", prices, spot=False) is None
    assert cost.price_of("ml.p4d.24xlarge", prices, spot=True) is None


def test_a_file_replaces_the_shipped_prices(tmp_path: Path):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"p5.48xlarge": {"on_demand": 98, "spot": 40, "date": "2026-11-01", "source": "us"}}))
    prices = cost.read_prices(file)
    assert cost.price_of("ml.p5.48xlarge", prices, spot=True) == Price(40.0, "USD", "2026-11-01", "us")
    assert cost.price_of("ml.p4d.24xlarge", prices, spot=False) is None


OTHERS = ["[]", "{", '{"p5": {}}', '{"p5": {"on_demand": 1, "currency": "EUR"}}', '{"p5": {"on_demand": -1}}']


@pytest.mark.parametrize("text", [*OTHERS, '{"p5": {"on_demand": 1, "spot": "cheap"}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(UserError, match="--prices"):
        cost.read_prices(tmp_path / "prices.json")


def test_stated_prices():
    assert cost.stated(["98"], ["p5.48xlarge"]) == {"p5.48xlarge": 98.0}
    assert cost.stated(["p5.48xlarge=98"], ["ml.p5.48xlarge"]) == {"p5.48xlarge": 98.0}
    assert cost.stated(["a=1.5", "b=2"], ["a", "b"]) == {"a": 1.5, "b": 2.0}
    for arguments, types in (
        (["1"], ["a", "b"]),
        (["c=1"], ["a", "b"]),
        (["a=much"], ["a", "b"]),
        (["0"], ["a"]),
        (["nan"], ["a"]),
    ):
        with pytest.raises(UserError, match="--price-per-hour"):
            cost.stated(arguments, types)


def test_the_price_of_aws():
    """An answer in the form that AWS documents for GetProducts."""

    class Pricing:
        def get_products(self, **asked):
            self.asked = asked
            dimension = {"pricePerUnit": {"USD": "37.6885000000"}, "unit": "Hrs"}
            term = {"effectiveDate": "2026-11-01T00:00:00Z", "priceDimensions": {"x": dimension}}
            return {"PriceList": [json.dumps({"product": {}, "terms": {"OnDemand": {"y": term}}})]}

    client = Pricing()
    price = cost.of_aws("ml.p4d.24xlarge", "ap-northeast-1", client)
    assert price == Price(37.6885, "USD", "2026-11-01", "AWS, ap-northeast-1")
    assert client.asked["ServiceCode"] == "AmazonSageMaker"
    values = {item["Field"]: item["Value"] for item in client.asked["Filters"]}
    assert values == {"instanceName": "ml.p4d.24xlarge", "component": "Training", "regionCode": "ap-northeast-1"}
    client.get_products = lambda **_: {"PriceList": []}  # type: ignore[method-assign]
    assert cost.of_aws("ml.p4d.24xlarge", "ap-northeast-1", client) is None
