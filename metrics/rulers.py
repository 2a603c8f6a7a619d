"""An earlier name of `python -m metrics.small_detectors`, which published commands use."""

from metrics.small_detectors import main

if __name__ == '__main__':
    main()
