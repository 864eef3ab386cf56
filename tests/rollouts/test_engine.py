import pytest

from posttrain.errors import UserError
from posttrain.rollouts.engine import Request, Sampling, check_request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-30),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_sampling_names_the_field_that_is_out_of_range(field, value):
    with pytest.raises(UserError, match=f"^{field}: "):
        Sampling(**{field: value})


def test_a_request_that_just_fits_is_accepted():
    check_request(Request(0, (1,) * 6, Sampling(max_tokens=4)), context=10)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"), [((), 4, "prompt"), ((1,) * 10, 4, "prompt"), ((1,) * 7, 4, "max_tokens")]
)
def test_a_request_that_cannot_fit_is_refused(prompt, max_tokens, field):
    with pytest.raises(UserError, match=f"^{field}: row 'x'"):
        check_request(Request(0, prompt, Sampling(max_tokens=max_tokens)), context=10, name="row 'x'")
