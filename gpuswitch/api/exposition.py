"""Where the metrics are to be had, as the configuration says: over HTTP or HTTPS, and in a file."""

from __future__ import annotations

import logging
from pathlib import Path

from gpuswitch.api.metrics import MetricsObserver
from gpuswitch.api.metrics_endpoint import MetricsEndpoint
from gpuswitch.api.process_metrics import with_processes
from gpuswitch.api.textfile import Textfile
from gpuswitch.api.tls import server_context
from gpuswitch.config.schema import Metrics
from gpuswitch.errors import ConfigError

_log = logging.getLogger(__name__)


class Exposition:
    """Lets others read what `metrics` has.

    The file has nothing of the service's own processes: node_exporter has metrics of these names itself.
    """

    def __init__(self, metrics: MetricsObserver) -> None:
        self._endpoint = MetricsEndpoint(with_processes(metrics.registry))
        self._textfile = Textfile(metrics.registry)
        metrics.heard = self._textfile.soon

    async def start(self, settings: Metrics) -> None:
        """As `follow`. A GPU is worth more than its metrics: where no certificate can be used, there are none over
        HTTP, least of all without it, and a warning says why.
        """
        try:
            await self.follow(settings)
        except ConfigError as error:
            _log.warning("no metrics over HTTPS: %s", error)
            self._keep(settings)

    async def follow(self, settings: Metrics) -> None:
        """Follow these settings, and read certificates anew.

        Raises:
            ConfigError: one of the files cannot be used; all is as before.
        """
        tls = server_context(settings)
        if settings.enabled and settings.address:
            await self._endpoint.serve(settings.address, settings.port, tls)
        else:
            await self._endpoint.stop()
        self._keep(settings)

    def _keep(self, settings: Metrics) -> None:
        directory = settings.textfile_directory if settings.enabled else ""
        self._textfile.keep_in(Path(directory) if directory else None)

    async def stop(self) -> None:
        await self._endpoint.stop()
        await self._textfile.stop()
