import time

from megatron_hypenet.engine.own_time import OwnTime


def test_own_time_is_that_of_the_blocks():
    clock = OwnTime()
    for _ in range(2):
        with clock.working():
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= clock.take() < 0.09 and clock.take() == 0.0
