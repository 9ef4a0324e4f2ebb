//! The pods of the shop.

use anyhow::Result;
use mesh_tests::{Mesh, Pod, PodSpec};

pub(crate) struct Shop {
    pub(crate) client: Pod,
    pub(crate) frontend: Pod,
    pub(crate) reviews_v1: Pod,
    pub(crate) reviews_v2: Pod,
    pub(crate) ledger: Pod,
}

/// Where the HTTP servers listen.
pub(crate) const HTTP: u16 = 8080;

impl Shop {
    /// The pods with their servers, and the documents about them.
    pub(crate) fn open(mesh: &mut Mesh) -> Result<Self> {
        mesh.apply("shop", include_str!("shop.yaml"))?;
        let client = mesh.pod(PodSpec::new("client", 0))?;
        let mut frontend = mesh.pod(PodSpec::new("frontend", 0))?;
        frontend.serve(&mesh.run, "front", HTTP)?;
        let mut ledger = mesh.pod(PodSpec::new("ledger", 1))?;
        ledger.serve(&mesh.run, "greeter", 2525)?;
        let reviews_v1 = reviews(mesh, "v1")?;
        let reviews_v2 = reviews(mesh, "v2")?;
        Ok(Self {
            client,
            frontend,
            reviews_v1,
            reviews_v2,
            ledger,
        })
    }

    /// Waits until the agents have taken the pods in.
    pub(crate) fn join(&self, mesh: &Mesh) -> Result<()> {
        self.pods().into_iter().try_for_each(|pod| mesh.wait_known(pod))
    }

    pub(crate) fn pods(&self) -> [&Pod; 5] {
        [
            &self.client,
            &self.frontend,
            &self.reviews_v1,
            &self.reviews_v2,
            &self.ledger,
        ]
    }
}

fn reviews(mesh: &mut Mesh, version: &str) -> Result<Pod> {
    let spec = PodSpec::new(&format!("reviews-{version}"), 1)
        .label("app", "reviews")
        .label("version", version)
        .service_account("reviews");
    let mut pod = mesh.pod(spec)?;
    pod.serve(&mesh.run, "http", HTTP)?;
    Ok(pod)
}
