"""Options of pytest for tests in the emulator."""


def pytest_addoption(parser):
    group = parser.getgroup("emulator")
    group.addoption(
        "--seeds",
        default="0,1",
        help="schedules of the emulator: 0 is the plain one, others are random (default: %(default)s)",
    )
    group.addoption(
        "--races", action="store_true", help="the emulator looks for races in shared memory"
    )


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        seeds = [int(seed) for seed in metafunc.config.getoption("--seeds").split(",")]
        metafunc.parametrize("seed", seeds, ids=[f"seed{seed}" for seed in seeds])
