"""The gateway (GW): who may ask, how often, how urgently; writes go to the queue, reads and cancels to the support service."""

from __future__ import annotations

from api.gateway.app import create_app
from api.gateway.config import GatewayConfig, JwtConfig, RatePolicy, TenantPolicy
from api.gateway.keys import Caller, KeyStore

__all__ = ["Caller", "GatewayConfig", "JwtConfig", "KeyStore", "RatePolicy", "TenantPolicy", "create_app"]
