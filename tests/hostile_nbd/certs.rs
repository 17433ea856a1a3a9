//! A certificate authority, a server's certificate and a client's, made anew each time.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore};

pub struct Certs {
    ca_pem: String,
    ca: CertificateDer<'static>,
    server_pem: String,
    server_key: String,
    client: CertificateDer<'static>,
    client_key: Vec<u8>,
}

impl Certs {
    pub fn new() -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(vec!["test".into()]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_cert = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let leaf = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![name.into()]).unwrap();
            (params.signed_by(&key, &issuer).unwrap(), key)
        };
        let ((server, server_key), (client, client_key)) = (leaf("localhost"), leaf("client"));
        Self {
            ca_pem: ca_cert.pem(),
            ca: ca_cert.der().clone(),
            server_pem: server.pem(),
            server_key: server_key.serialize_pem(),
            client: client.der().clone(),
            client_key: client_key.serialize_der(),
        }
    }

    /// A server's settings.
    pub fn settings<'a>(&'a self, tls: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![
            ("tls", tls),
            ("tls-certificate", &self.server_pem),
            ("tls-key", &self.server_key),
            ("tls-ca", &self.ca_pem),
        ]
    }

    /// A client's, with a certificate or without.
    pub fn client(&self, with_certificate: bool) -> Arc<ClientConfig> {
        self.config(with_certificate.then_some(self))
    }

    /// A client's, with a certificate of an authority that the server does not know.
    pub fn mixed_client(&self, other: &Self) -> Arc<ClientConfig> {
        self.config(Some(other))
    }

    fn config(&self, identity: Option<&Self>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match identity {
            Some(own) => {
                let key = PrivatePkcs8KeyDer::from(own.client_key.clone());
                builder.with_client_auth_cert(vec![own.client.clone()], key.into()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        Arc::new(config)
    }
}
