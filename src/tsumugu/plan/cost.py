"""What a run costs: hours times a price that somebody has stated, with its date; without one there is no cost."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tsumugu.errors import UserError

_KINDS = {False: "on_demand", True: "spot"}


@dataclass(frozen=True)
class Price:
    """Of an instance for an hour.

    Attributes:
        per_hour: In `currency`.
        currency: USD, or JPY.
        date: Since when, or when it was asked for, as far as that is known.
        source: Who says so.
    """

    per_hour: float
    currency: str
    date: str
    source: str

    def in_yen(self, yen_per_dollar: float) -> "Price":
        assert self.currency == "USD"
        return Price(
            self.per_hour * yen_per_dollar, "JPY", self.date, f"{self.source}; {yen_per_dollar:g} yen a dollar"
        )


@dataclass(frozen=True)
class Cost:
    """Of a whole run: `amount` in the price's currency for all instances."""

    price: Price
    amount: float

    def to_json(self) -> dict[str, Any]:
        return {
            "currency": self.price.currency,
            "amount": self.amount,
            "price_per_hour": self.price.per_hour,
            "price_date": self.price.date,
        }


def cost(price: Price, instances: int, days: float) -> Cost:
    return Cost(price, price.per_hour * instances * days * 24)


def read_prices(file: Path | None) -> dict[str, dict[str, Any]]:
    """Prices by instance type: those of data/prices.json, or of a file of the same form in their place.

    Raises:
        UserError: The file is none of prices.
    """
    if file is None:
        return json.loads(resources.files("tsumugu.plan").joinpath("data/prices.json").read_text(encoding="utf-8"))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, entry in found.items():
            prices = [entry[kind] for kind in _KINDS.values() if entry.get(kind) is not None]
            if not prices or not all(isinstance(price, (int, float)) and _is_price(price) for price in prices):
                raise ValueError(f"{name} has no positive number on_demand or spot")
            if entry.get("currency", "USD") not in ("USD", "JPY"):
                raise ValueError(f"{name}: currency is neither USD nor JPY")
    except (OSError, ValueError, AttributeError) as error:
        example = '{"ml.p4d.24xlarge": {"on_demand": 32.77, "currency": "USD", "date": "2023"}}'
        raise UserError(f"--prices {file}: {error}", f"write such as {example}") from None
    return found


def _is_price(number: float) -> bool:
    return 0 < number < math.inf


def stated(arguments: Sequence[str], instance_types: Sequence[str]) -> dict[str, float]:
    """--price-per-hour as given: a price, or with several instance types TYPE=PRICE for each. Names are without `ml.`.

    Raises:
        UserError: It is neither.
    """
    found: dict[str, float] = {}
    types = list(dict.fromkeys(name.removeprefix("ml.") for name in instance_types))
    for argument in arguments:
        name, _, text = argument.rpartition("=")
        name = name.removeprefix("ml.")
        try:
            price = float(text)
        except ValueError:
            price = math.nan
        if not _is_price(price):
            raise UserError(f"--price-per-hour {argument} is no price", "give USD an hour, or TYPE=USD")
        if name and name not in types:
            raise UserError(f"--price-per-hour names {name}", f"planned are: {', '.join(instance_types)}")
        if not name and len(types) > 1:
            raise UserError("--price-per-hour is one price for several instance types", "give TYPE=PRICE for each")
        found |= dict.fromkeys([name] if name else types, price)
    return found


def price_of(name: str, prices: dict[str, dict[str, Any]], spot: bool) -> Price | None:
    """The price of an instance type; None where it is not known."""
    entry = prices.get(name) or prices.get(f"ml.{name}") or prices.get(name.removeprefix("ml.")) or {}
    per_hour = entry.get(_KINDS[spot])
    if per_hour is None:
        return None
    date, source = str(entry.get("date", "not dated")), entry.get("source", "the file of prices")
    return Price(float(per_hour), entry.get("currency", "USD"), date, source)


def of_aws(name: str, region: str, client: Any = None) -> Price | None:
    """The on-demand price of a SageMaker training instance by AWS's pricing API; None where it has none.

    Args:
        name: `ml.` and so on.
        region: Such as ap-northeast-1.
        client: boto3's for `pricing`.

    Raises:
        UserError: boto3 or credentials are missing, or AWS refuses.
    """
    if client is None:
        try:
            import boto3  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("--aws-prices needs boto3", "pip install boto3, or give --price-per-hour") from None
        client = boto3.client("pricing", region_name="us-east-1")
    wanted = {"instanceName": name, "component": "Training", "regionCode": region}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    try:
        answer = client.get_products(ServiceCode="AmazonSageMaker", Filters=filters, MaxResults=10)
    except Exception as error:  # boto3 makes its classes of errors as it goes
        reason = " ".join(str(error).split())
        raise UserError(f"--aws-prices: AWS gave no price: {reason}", "give --price-per-hour") from None
    for text in answer["PriceList"]:
        product = json.loads(text)
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                per_hour = float(dimension["pricePerUnit"].get("USD", 0))
                if per_hour > 0:
                    return Price(per_hour, "USD", term["effectiveDate"][:10], f"AWS, {region}")
    return None
