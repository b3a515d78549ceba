"""Personal data in text, replaced by a placeholder of its kind."""

import ipaddress
import re

_DIGIT = "[0-9０-９]"
_HYPHEN = "[-‐‑–－−ー]"
_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}[@＠](?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])", re.A
)


def _phone_pattern() -> re.Pattern:
    """Japanese telephone numbers: ten digits in three groups, mobile, free and shared-cost ones, +81."""

    def groups(*sizes: int, between: str = _HYPHEN) -> str:
        return between.join(f"{_DIGIT}{{{size}}}" for size in sizes)

    numbers = []
    for area in (1, 2, 3, 4):  # digits of the area behind the 0, and of the exchange: five together
        exchange = 5 - area
        numbers.append(f"[0０]{groups(area, exchange, 4)}")
        numbers.append(f"[(（]?[0０]{groups(area)} ?[)）(（] ?{groups(exchange)} ?(?:{_HYPHEN}|[)）]) ?{groups(4)}")
    numbers.append(f"[0０][5-9５-９][0０]{_HYPHEN}?{groups(4)}{_HYPHEN}?{groups(4)}")
    numbers.append(f"(?:[0０][1１][2２][0０]|[0０][5５][7７][0０]){_HYPHEN}{groups(3, 3)}")
    numbers.append(f"[0０][8８][0０][0０]{_HYPHEN}{groups(3, 4)}")
    between = f"(?: |{_HYPHEN})"
    abroad = rf"[+＋][8８][1１]{between}?"
    numbers.append(rf"{abroad}(?:[(（][0０][)）] ?)?{_DIGIT}{{1,4}}{between}{_DIGIT}{{1,4}}{between}{_DIGIT}{{4}}")
    numbers.append(rf"{abroad}[5-9５-９][0０]{_DIGIT}{{8}}")
    return re.compile(rf"(?<![\w０-９.,+-])(?:{'|'.join(numbers)})(?![-‐‑–－−]?{_DIGIT})", re.A)


_PHONE = _phone_pattern()
_IP = re.compile(
    r"(?P<version>(?:\bv|\bver|version|バージョン)[. ]{0,2})?(?<![\w.])"
    r"(?:(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)|[23][\dA-F]{3}:[\dA-F:]{2,34}(?![\w:]))",
    re.A | re.I,
)
_FOUR = f"{_DIGIT}{{4}}"
_GAP = f"(?:[ 　]|{_HYPHEN})?"
_LABEL = r"(?:個人番号|マイナンバー|My ?Number)[^0-9０-９\n]{0,12}"
_MY_NUMBER = re.compile(f"({_LABEL}){_FOUR}{_GAP}{_FOUR}{_GAP}{_FOUR}(?!{_DIGIT})", re.I)


def _mask_email(text: str) -> str:
    return _EMAIL.sub("<email>", text) if "@" in text or "＠" in text else text


def _mask_phone(text: str) -> str:
    return _PHONE.sub("<phone>", text)


def _mask_ip(text: str) -> str:
    return _IP.sub(lambda match: "<ip_address>" if _is_address(match) else match[0], text)


def _is_address(match: re.Match) -> bool:
    """Whether it is an address of somebody: not a version number, a time or part of a private network."""
    try:
        return match["version"] is None and ipaddress.ip_address(match[0]).is_global
    except ValueError:
        return False


def _mask_my_number(text: str) -> str:
    return _MY_NUMBER.sub(r"\1<my_number>", text)


MASKS = {"email": _mask_email, "phone": _mask_phone, "ip": _mask_ip, "my_number": _mask_my_number}
